"""Contrast of one sample's embeddings, each whitened in channel groups of its own."""

from typing import Unpack

import torch
from torch import Tensor, nn

from ccl_fast.checks import (
    check_count,
    check_flag,
    check_floating,
    check_matrix,
    check_positive,
    check_same,
    check_tensor,
    host_knows,
)
from ccl_fast.errors import ArgumentError
from ccl_fast.losses.base import CommonOptions, Loss
from ccl_fast.ops import cross_entropy, row_dot, streaming_logsumexp
from ccl_fast.ops.differentiable import Differentiable, savable
from ccl_fast.ops.precision import accumulation_dtype, without_autocast


class WhitenedCSELoss(Loss):
    r"""InfoNCE with several positives, which differ by the groups of channels in which they are whitened.

    With h the whitened embeddings (`shuffled_group_whitening`) of V views, of unit length after the head:

    .. math::
        \ell_i = \frac{1}{V - 1} \sum_{v = 2}^{V} \Big( \log \sum_j e^{\langle h_i^1, h_j^v \rangle / T}
            - \langle h_i^1, h_i^v \rangle / T \Big)

    Views are passes through the encoder (dropout) or one and the same, then told apart by the shuffles alone. Memory is
    linear in n; one log-sum-exp for each positive.

    Zhuo, Sun, Wang, Zhu, Yang, "WhitenedCSE: Whitening-based Contrastive Learning of Sentence Embeddings"
    (arXiv:2305.17746), as in the authors' code (three views, 128 groups of BERT's 768 channels, the head a linear layer
    and tanh), which adds the positives' terms up instead of their mean.

    Args:
        temperature: T, > 0; the initial value if learnable.
        groups: of channels; they divide d.
        eps: added to the eigenvalues of the covariances, > 0.
        head: applied to the whitened rows ``[n, d]`` of each view; None for none.
        through_covariance: as of `shuffled_group_whitening`.
        learnable_temperature, normalize, reduction, backend: as in `Loss`. (It runs on one process.)

    Cost:
        operators: LSE per positive; `torch.linalg.eigh` per group.
        units: 4 (V - 1) of N x N x D.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import WhitenedCSELoss
        >>> sentences = torch.randn(32, 3, 16)  # three passes with dropout
        >>> WhitenedCSELoss(temperature=0.05, groups=4)(sentences).shape
        torch.Size([])
    """

    unsupported = ("process_group", "exchange")

    def __init__(
        self,
        temperature: float = 0.05,
        *,
        groups: int = 128,
        eps: float = 1e-5,
        head: nn.Module | None = None,
        through_covariance: bool = False,
        **common: Unpack[CommonOptions],
    ):
        super().__init__(temperature, **common)
        check_count("groups", groups)
        check_positive("eps", eps)
        check_flag("through_covariance", through_covariance)
        self.groups, self.eps, self.head, self.through_covariance = groups, eps, head, through_covariance

    def forward(
        self, embeddings: Tensor, *, shuffles: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the loss.

        Args:
            embeddings: ``[n, views, d]``, at least two views, the first being the anchor; float64, float32, bfloat16,
                float16. Of a single pass ``x[:, None].expand(-1, 3, -1)``.
            shuffles: ``[views, d]``, int64: a permutation of the channels for each view; None draws them.
            generator: that draws them; None is torch's of the embeddings' device.

        Returns:
            The loss, float32 (float64 for float64 embeddings). With reduction "none" a loss per sample, ``[n]``.

        Raises:
            ValueError: an argument has the wrong type, shape, dtype, device or value.
        """
        check_tensor("embeddings", embeddings)
        if embeddings.ndim != 3 or embeddings.shape[1] < 2:
            raise ArgumentError(f"embeddings: expected shape [n, at least 2 views, d], got {list(embeddings.shape)}")
        check_floating("embeddings", embeddings)
        views, d = embeddings.shape[1:]
        if shuffles is None:
            shuffles = torch.stack([_draw(d, embeddings.device, generator) for _ in range(views)])
        check_matrix("shuffles", shuffles, columns=d)
        if shuffles.shape[0] != views:
            raise ArgumentError(f"shuffles: expected {views} rows (one per view), got {shuffles.shape[0]}")
        for view in range(views):
            _check_shuffle(shuffles[view], embeddings[:, view], f"shuffles[{view}]")
        scale = 1.0 / self.temperature
        anchors, *positives = (self._embed(embeddings[:, v], shuffles[v]) for v in range(views))
        samples = torch.arange(embeddings.shape[0], device=embeddings.device)

        def losses(keys: Tensor) -> Tensor:
            rest = streaming_logsumexp(
                anchors,
                keys,
                scale=scale,
                q_ids=samples,
                k_ids=samples,
                candidates="other_id",
                backend=self.backend,
            )
            return cross_entropy(rest, row_dot(anchors, keys) * scale) / (views - 1)

        first, *others = (losses(keys) for keys in positives)
        return self.reduce(sum(others, first))

    def _embed(self, x: Tensor, shuffle: Tensor) -> Tensor:
        x = shuffled_group_whitening(
            x, groups=self.groups, shuffle=shuffle, eps=self.eps, through_covariance=self.through_covariance
        )
        return self.unit(x if self.head is None else self.head(x))


def shuffled_group_whitening(
    x: Tensor,
    *,
    groups: int,
    shuffle: Tensor | None = None,
    generator: torch.Generator | None = None,
    eps: float = 1e-5,
    through_covariance: bool = False,
) -> Tensor:
    r"""Whiten channels in groups, into which they are divided at random.

    In each group, of the columns X of x (in the order of the shuffle) with mean :math:`\mu`,

    .. math::
        (X - \mu) (\Sigma + \epsilon I)^{-1/2}, \qquad \Sigma = (X - \mu)^\top (X - \mu) / n

    (ZCA), and back at their own place. The result has mean 0 and, in each group and as far as there are more rows than
    channels and variances well above eps, covariance I; directions without variance are 0. It is computed in float32
    (float64 for float64), also under autocast. The gradient (through the covariance, if that is wanted) is exact and
    finite for equal eigenvalues too, and can be differentiated again. On a GPU the eigenvalues wait for the device.

    Zhuo et al., "WhitenedCSE" (arXiv:2305.17746), whose code adds nothing to the eigenvalues.

    Args:
        x: ``[n, d]``, float64, float32, bfloat16, float16.
        groups: of d / groups channels each; they divide d.
        shuffle: ``[d]``, int64: a permutation of the channels, the first d / groups being the first group; None
            draws it.
        generator: that draws it; None is torch's of the device of x.
        eps: > 0.
        through_covariance: the gradient passes through the covariance too; if not, this is a constant, as in the
            authors' code.

    Returns:
        ``[n, d]``, of the dtype of x.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import shuffled_group_whitening
        >>> white = shuffled_group_whitening(torch.randn(100, 16), groups=4)
        >>> torch.allclose(white.var(0, correction=0), torch.ones(16), atol=1e-3)
        True
    """
    check_matrix("x", x)
    check_floating("x", x)
    check_count("groups", groups)
    check_positive("eps", eps)
    check_flag("through_covariance", through_covariance)
    n, d = x.shape
    if d % groups:
        raise ArgumentError(f"groups: expected a divisor of {d} (the channels), got {groups}")
    if shuffle is None:
        shuffle = _draw(d, x.device, generator)
    _check_shuffle(shuffle, x)
    shuffle = savable(shuffle)
    with without_autocast(x.device):
        grouped = x.to(accumulation_dtype(x))[:, shuffle].unflatten(1, (groups, d // groups))
        # (Of no rows there is no mean.)
        centered = (grouped - grouped.sum(0) / max(n, 1)).transpose(0, 1)
        covariance = centered.mT @ centered / max(n, 1)
        if not through_covariance:
            covariance = covariance.detach()
        whitened = centered @ _INVERSE_ROOT(covariance, eps)[0]
    return whitened.transpose(0, 1).flatten(1)[:, shuffle.argsort()].to(x.dtype)


def _inverse_root(a: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(A + eps I)^(-1/2) of symmetric A, none of whose eigenvalues is negative but for rounding; and `_eigen`'s."""
    vectors, roots = _eigen(a, eps)
    return (vectors / roots[..., None, :]) @ vectors.mT, vectors, roots


def _save(ctx, inputs, output) -> None:
    a, ctx.eps = inputs
    _, vectors, roots = output
    ctx.mark_non_differentiable(vectors, roots)
    ctx.save_for_backward(a, vectors, roots)


def _gradients(ctx, grad: Tensor, *_) -> tuple[Tensor, None]:
    """In the basis of the eigenvectors, by the divided differences of the root, without a difference of eigenvalues.

    (The derivative of the eigenvectors divides by these, and several may be equal.)
    """
    a, vectors, roots = ctx.saved_tensors
    with without_autocast(a.device):
        if torch.is_grad_enabled():  # to be differentiated again
            vectors, roots = _eigen(a, ctx.eps)
        rows, columns = roots[..., :, None], roots[..., None, :]
        inner = vectors.mT @ grad @ vectors / (rows * columns * (rows + columns))
        return -vectors @ inner @ vectors.mT, None


_INVERSE_ROOT = Differentiable("whiten", _inverse_root, _save, _gradients)


def _eigen(a: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Eigenvectors, and the roots of the eigenvalues of a + eps I; of what is not finite, NaN instead of an error."""
    finite = a.isfinite().flatten(-2).all(-1)[..., None, None]
    values, vectors = torch.linalg.eigh(torch.where(finite, a, 0.0))
    roots = (values.clamp(min=0.0) + eps).sqrt()
    return vectors, torch.where(finite[..., 0], roots, torch.nan)


def _draw(d: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    return torch.randperm(d, generator=generator, device=device if generator is None else generator.device).to(device)


def _check_shuffle(shuffle: Tensor, x: Tensor, name: str = "shuffle") -> None:
    check_tensor(name, shuffle)
    if shuffle.shape != x.shape[1:]:
        raise ArgumentError(f"{name}: expected shape [{x.shape[1]}], got {list(shuffle.shape)}")
    if shuffle.dtype != torch.int64:
        raise ArgumentError(f"{name}: expected int64, got {shuffle.dtype}")
    check_same(name, shuffle, "the embeddings", x, dtype=False)
    if host_knows(shuffle) and not torch.equal(
        shuffle.sort().values, torch.arange(shuffle.shape[0], device=shuffle.device)
    ):
        raise ArgumentError(f"{name}: expected a permutation of 0 to {shuffle.shape[0] - 1}, got {shuffle.tolist()}")
