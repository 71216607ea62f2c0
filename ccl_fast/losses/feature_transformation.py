"""Harder positives and more diverse negatives, made of the features themselves."""

import math
from typing import Unpack

import torch
from torch import Tensor

from ccl_fast.checks import check_flag, check_floating, check_matrix, check_positive
from ccl_fast.errors import ArgumentError
from ccl_fast.losses.base import CommonOptions, Loss
from ccl_fast.losses.batch import check_queries
from ccl_fast.ops import cross_entropy, row_dot, streaming_logsumexp
from ccl_fast.ops.precision import accumulation_dtype


class FeatureTransformationLoss(Loss):
    r"""InfoNCE with a queue, over transformed features: positives drawn apart, negatives mixed with each other.

    With unit queries q, unit keys k, :math:`\hat q, \hat k` of `extrapolate_positives` and :math:`\hat n` of
    `interpolate_negatives`, none of them scaled to unit length again,

    .. math::
        \ell_i = \log \Big( e^{\langle \hat q_i, \hat k_i \rangle / T} + \sum_{j = 1}^{m}
            e^{\langle \hat q_i, \hat n_j \rangle / T} \Big) - \langle \hat q_i, \hat k_i \rangle / T

    As in MoCo the negatives are those of the queue alone, and keys and queue get no gradient; queries get theirs from
    :math:`\hat k` too. Memory is linear in n and m.

    Zhu et al., "Improving Contrastive Learning by Visualizing Feature Transformation" (arXiv:2108.02982); the default
    temperature is that of its MoCo v2. The authors' code draws one lambda for the batch and one for the queue, where
    here each row has its own; with ``per_dimension`` both have one for each number.

    Args:
        temperature: T, > 0; the initial value if learnable.
        positive_alpha: of `extrapolate_positives`, > 0, or None to leave the pairs as they are.
        negative_alpha: of `interpolate_negatives`, > 0, or None to leave the queue as it is.
        per_dimension: a lambda for each dimension of a row.
        learnable_temperature, normalize, reduction, backend: as in `Loss`. (It runs on one process.)

    Cost:
        operators: LSE over the mixed queue.
        units: 3 of N x M x D.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import FeatureTransformationLoss
        >>> loss_fn = FeatureTransformationLoss(temperature=0.2)
        >>> loss_fn(torch.randn(8, 16), torch.randn(8, 16), negatives=torch.randn(64, 16)).shape
        torch.Size([])
    """

    unsupported = ("process_group", "exchange")

    def __init__(
        self,
        temperature: float = 0.2,
        *,
        positive_alpha: float | None = 2.0,
        negative_alpha: float | None = 1.6,
        per_dimension: bool = False,
        **common: Unpack[CommonOptions],
    ):
        super().__init__(temperature, **common)
        for name, alpha in (("positive_alpha", positive_alpha), ("negative_alpha", negative_alpha)):
            if alpha is not None:
                check_positive(name, alpha)
        check_flag("per_dimension", per_dimension)
        self.positive_alpha, self.negative_alpha, self.per_dimension = positive_alpha, negative_alpha, per_dimension

    def forward(
        self, queries: Tensor, keys: Tensor, *, negatives: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the loss.

        Args:
            queries: ``[n, d]``; float64, float32, bfloat16, float16.
            keys: ``[n, d]``; row i is the positive of query i. They get no gradient.
            negatives: ``[m, d]``, the queue. It gets no gradient, and is not changed.
            generator: of the random numbers, which are drawn on its device; None is torch's own.

        Returns:
            The loss, float32 (float64 for float64 input). With reduction "none" a loss per query, ``[n]``.

        Raises:
            ValueError: an argument has the wrong type, shape, dtype, device or value.
        """
        check_queries(queries, keys, negatives, required=("keys", "negatives"))
        q, k, n = self.unit(queries), self.unit(keys.detach()), self.unit(negatives.detach())
        options = {"per_dimension": self.per_dimension, "generator": generator}
        if self.positive_alpha is not None:
            q, k = extrapolate_positives(q, k, alpha=self.positive_alpha, **options)
        if self.negative_alpha is not None:
            n = interpolate_negatives(n, alpha=self.negative_alpha, **options)
        scale = 1.0 / self.temperature
        positives = row_dot(q, k) * scale
        losses = cross_entropy(streaming_logsumexp(q, n, scale=scale, backend=self.backend), positives)
        return self.reduce(losses)


def extrapolate_positives(
    queries: Tensor,
    keys: Tensor,
    *,
    alpha: float = 2.0,
    per_dimension: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Draw a query and its key apart, along their difference: a harder positive.

    .. math::
        \hat q = \lambda q + (1 - \lambda) k, \qquad \hat k = \lambda k + (1 - \lambda) q, \qquad
        \lambda - 1 \sim \mathrm{Beta}(\alpha, \alpha)

    As :math:`\langle \hat q, \hat k \rangle = \langle q, k \rangle - \lambda (\lambda - 1) |q - k|^2` their
    similarity only falls. Gradients flow to both, through both.

    Zhu et al., "Improving Contrastive Learning by Visualizing Feature Transformation" (arXiv:2108.02982).

    Args:
        queries: ``[n, d]``; float64, float32, bfloat16, float16.
        keys: ``[n, d]``; row i is the positive of query i.
        alpha: > 0; small values draw lambda to 1 and 2, large ones to 1.5.
        per_dimension: a lambda for each dimension of a row, not one for the row.
        generator: of the random numbers, which are drawn on its device; None is torch's own.

    Returns:
        Both transformed ``[n, d]``, not of unit length, of the dtype of ``queries``.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import extrapolate_positives
        >>> q, k = extrapolate_positives(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        >>> bool((q * k).sum() < 0)
        True
    """
    check_queries(queries, keys, required=("keys",))
    weights = 1.0 + _mixing_weights(queries, alpha, per_dimension, generator)
    return _mix(queries, keys, weights), _mix(keys, queries, weights)


def interpolate_negatives(
    negatives: Tensor, *, alpha: float = 1.6, per_dimension: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    r"""Mix each negative with another one of the queue, by a random permutation :math:`\pi`.

    .. math::
        \hat n_j = \lambda n_j + (1 - \lambda) n_{\pi(j)}, \qquad \lambda \sim \mathrm{Beta}(\alpha, \alpha)

    Gradients flow. Zhu et al., "Improving Contrastive Learning by Visualizing Feature Transformation"
    (arXiv:2108.02982).

    Args:
        negatives: ``[m, d]``; float64, float32, bfloat16, float16.
        alpha: > 0; small values draw lambda to 0 and 1, large ones to 0.5.
        per_dimension: a lambda for each dimension of a row, not one for the row.
        generator: of the random numbers, which are drawn on its device; None is torch's own.

    Returns:
        The mixtures ``[m, d]``, not of unit length, of the dtype of ``negatives``.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import interpolate_negatives
        >>> interpolate_negatives(torch.randn(64, 16)).shape
        torch.Size([64, 16])
    """
    check_matrix("negatives", negatives)
    check_floating("negatives", negatives)
    weights = _mixing_weights(negatives, alpha, per_dimension, generator)
    order = torch.randperm(negatives.shape[0], generator=generator, device=_device(negatives, generator))
    return _mix(negatives, negatives[order.to(negatives.device)], weights)


def symmetric_beta(
    shape: tuple[int, ...], alpha: float, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    r"""Random numbers of :math:`\mathrm{Beta}(\alpha, \alpha)`, float64.

    Exact, and without rejection: :math:`t / \sqrt{\nu + t^2}` of Student's t with :math:`\nu = 2 \alpha` degrees of
    freedom is :math:`2 \lambda - 1`, and t is drawn by Bailey's polar method ("Polar Generation of Random Variates with
    the t-Distribution", Mathematics of Computation 62, 1994). (torch draws from a Beta only with its own generator.)
    """
    u, v = torch.rand((2, *shape), generator=generator, device=device, dtype=torch.float64)
    w, cosine = (1.0 - u) ** (1.0 / alpha), (2.0 * math.pi * v).cos()  # 1 - u: from (0, 1]
    twice = 1.0 + cosine * ((1.0 - w) / (w + (1.0 - w) * cosine.square())).sqrt()
    return (twice / 2.0).clamp(0.0, 1.0)


def _mixing_weights(x: Tensor, alpha: float, per_dimension: bool, generator: torch.Generator | None) -> Tensor:
    check_positive("alpha", alpha)
    check_flag("per_dimension", per_dimension)
    shape = (x.shape[0], x.shape[1] if per_dimension else 1)
    weights = symmetric_beta(shape, alpha, _device(x, generator), generator)
    return weights.to(x.device, accumulation_dtype(x))


def _device(x: Tensor, generator: torch.Generator | None) -> torch.device:
    """Where random numbers are drawn."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ArgumentError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")
    return x.device if generator is None else generator.device


def _mix(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """weights a + (1 - weights) b."""
    return torch.lerp(b.to(weights.dtype), a.to(weights.dtype), weights).to(a.dtype)
