"""Contrastive analysis: what two data sets share apart from what only one of them has."""

import math
from typing import Unpack

import torch
from torch import Tensor

from ccl_fast.checks import check_floating, check_not_negative, check_same, check_tensor, check_vector, product_dtype
from ccl_fast.errors import ArgumentError
from ccl_fast.losses.base import CommonOptions, Loss
from ccl_fast.ops import logaddexp, row_dot, streaming_logsumexp
from ccl_fast.ops.precision import accumulation_dtype, without_autocast


class SepCLRLoss(Loss):
    r"""Separates common features, of a background and a target set, from salient ones, of the target set alone.

    With c the common features (of unit length) and s the salient ones (in Euclidean space) of two views of each sample,
    :math:`\tilde s` the salient features with the point :math:`s' = 0` in place of every background sample's, and of
    any rows x

    .. math::
        A(x) = \frac{1}{2 \tau} \operatorname{mean}_i |x_i^1 - x_i^2|^2, \qquad
        U(x) = \sum_{v = 1}^{2} \log \operatorname{mean}_{i \ne j} e^{-|x_i^v - x_j^v|^2 / 2 \tau}

    the loss is, with weights :math:`\beta_s, \beta_b, \lambda`,

    .. math::
        A(c) + U(c) + \beta_s \big( A(s_{target}) + U(\tilde s) \big)
            + \frac{\beta_b}{2 \tau} \operatorname{mean} |s_{background}|^2
            + \lambda \operatorname{mean}_{i, v} \log \operatorname{mean}_{j}
                e^{-(|c_i^v - c_j^v|^2 + |\tilde s_i^v - \tilde s_j^v|^2) / 2 \tau}

    Views of a sample attract, samples repel, target samples also repel s', to which the background is pulled; the last
    term (k-JEM, a kernel estimate of the negative joint entropy of both, j = i included) makes them independent.
    Memory is linear in n. A batch with no pair, no target or no background lacks what is a mean over these.

    Louiset, Duchesnay, Grigis, Gori, "Separating common from salient patterns with Contrastive Representation Learning"
    (arXiv:2402.11928), as in the authors' code: with b background samples in the batch s' is in it b times (they count
    as pairs of distance 0 too). Its supervised terms are not here.

    Args:
        temperature: tau, > 0; the initial value if learnable.
        salient_weight: beta_s, >= 0; the defaults are those of the authors' code for CIFAR-10 with MNIST and CelebA.
            (For CheXpert and ODIR: 1, and a background_weight of 10 and 100.)
        background_weight: beta_b, >= 0.
        independence_weight: lambda, >= 0. A term of weight 0 is not computed.
        learnable_temperature: make log tau a parameter (``log_temperature``).
        normalize: scale common features to unit length; if not, they are used as they come.
        backend: of the streaming log-sum-exp: "auto", "triton", "blocked" or "reference".
        reduction: "mean" alone, as the loss is no sum over samples. (It runs on one process.)

    Cost:
        operators: per view three LSEs with squared norms as biases: common (D), salient (E), both side by side.
        units: 8 of N x N x (D + E).

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import SepCLRLoss
        >>> common, salient = torch.randn(8, 2, 16), torch.randn(8, 2, 4)
        >>> SepCLRLoss()(common, salient=salient, is_target=torch.arange(8) < 4).shape
        torch.Size([])
    """

    unsupported = ("reduction", "process_group", "exchange")

    def __init__(
        self,
        temperature: float = 0.5,
        *,
        salient_weight: float = 1000.0,
        background_weight: float = 1000.0,
        independence_weight: float = 10.0,
        **common: Unpack[CommonOptions],
    ):
        super().__init__(temperature, **common)
        weights = {
            "salient_weight": salient_weight,
            "background_weight": background_weight,
            "independence_weight": independence_weight,
        }
        for name, value in weights.items():
            check_not_negative(name, value)
        self.salient_weight, self.background_weight = salient_weight, background_weight
        self.independence_weight = independence_weight

    def forward(self, embeddings: Tensor, *, salient: Tensor, is_target: Tensor) -> Tensor:
        """Return the loss.

        Args:
            embeddings: ``[n, 2, d]``: common features of two views of each sample; float64, float32, bfloat16, float16.
            salient: ``[n, 2, e]``: salient features of the same views.
            is_target: ``[n]``, bool: which samples are of the target set; the others are background.

        Returns:
            The loss, a number; float32 (float64 for float64 features).

        Raises:
            ValueError: an argument has the wrong type, shape, dtype or device.
        """
        _check(embeddings, salient, is_target)
        weight = 0.5 / self.temperature
        of_background = ~is_target[:, None]
        c = [self.unit(view) for view in embeddings.unbind(1)]
        s = [view.to(product_dtype(view)) for view in salient.unbind(1)]
        at_point = [view.masked_fill(of_background, 0.0) for view in s]

        everywhere = torch.ones_like(is_target)
        loss = _mean(weight * _distance(*c), everywhere) + self._uniformity(c)
        if self.salient_weight:
            aligned = _mean(weight * _distance(*s), is_target)
            loss = loss + self.salient_weight * (aligned + self._uniformity(at_point))
        if self.background_weight:
            squares = 0.5 * weight * (row_dot(s[0], s[0]) + row_dot(s[1], s[1]))
            loss = loss + self.background_weight * _mean(squares, ~is_target)
        if self.independence_weight:
            loss = loss + self.independence_weight * self._joint(c, at_point, everywhere)
        return loss

    def _kernel(self, x: Tensor) -> Tensor:
        """Logarithm of the Gaussian potential at each row, of all others."""
        scale = 1.0 / self.temperature
        # About their mean rows have smaller squares, of which less is lost by cancellation.
        x = x.to(accumulation_dtype(x))
        x = x - x.detach().mean(0)
        half_square = 0.5 * scale * row_dot(x, x)
        with without_autocast(x.device):
            return streaming_logsumexp(x, scale=scale, key_bias=-half_square, backend=self.backend) - half_square

    def _uniformity(self, views: list[Tensor]) -> Tensor | float:
        n = views[0].shape[0]
        if n < 2:
            return 0.0
        return sum(self._kernel(x).logsumexp(0) for x in views) - 2 * math.log(n * (n - 1))

    def _joint(self, common: list[Tensor], salient: list[Tensor], everywhere: Tensor) -> Tensor:
        # Squared distances of features side by side are added up: their kernel is the product of both.
        others = [self._kernel(torch.cat((c, s.to(c.dtype)), 1)) for c, s in zip(common, salient, strict=True)]
        first, second = (logaddexp(x, torch.zeros_like(x)) for x in others)  # with itself
        return _mean(0.5 * (first + second), everywhere) - math.log(max(everywhere.shape[0], 1))


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Squared, of the rows."""
    difference = a.to(accumulation_dtype(a)) - b
    return row_dot(difference, difference)


def _mean(x: Tensor, where: Tensor) -> Tensor:
    """Of the rows where a mask is set; 0 if nowhere."""
    return x.masked_fill(~where, 0.0).sum() / where.sum().clamp(min=1)


def _check(embeddings: Tensor, salient: Tensor, is_target: Tensor) -> None:
    for name, x in (("embeddings", embeddings), ("salient", salient)):
        check_tensor(name, x)
        if x.ndim != 3 or x.shape[1] != 2:
            raise ArgumentError(f"{name}: expected shape [n, 2, d], got {list(x.shape)}")
        check_floating(name, x)
    check_same("salient", salient, "embeddings", embeddings)
    if salient.shape[0] != embeddings.shape[0]:
        expected = f"{embeddings.shape[0]} samples (those of embeddings)"
        raise ArgumentError(f"salient: expected {expected}, got {salient.shape[0]}")
    check_vector("is_target", is_target, embeddings.shape[0])
    if is_target.dtype != torch.bool:
        raise ArgumentError(f"is_target: expected bool, got {is_target.dtype}")
    check_same("is_target", is_target, "embeddings", embeddings, dtype=False)
