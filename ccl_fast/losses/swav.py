"""Contrast of cluster assignments between views."""

from typing import Unpack

import torch
from torch import Tensor

from ccl_fast.checks import check_count, check_floating, check_matrix, check_same, check_tensor, checked_temperature
from ccl_fast.errors import ArgumentError
from ccl_fast.losses.base import CommonOptions, Loss
from ccl_fast.losses.batch import check_some
from ccl_fast.ops import swapped_prediction
from ccl_fast.ops.transport.sinkhorn import column_potentials


class SwAVLoss(Loss):
    r"""Predicts the assignment of one view to prototypes from the other views of the same image.

    With z unit embeddings of V views, c unit prototypes, :math:`s_{ik} = \langle z_i, c_k \rangle`, and for each of
    the G global views its assignments q: the plan of Sinkhorn's algorithm on :math:`s / \epsilon`, in which all
    prototypes get the same mass (no gradient flows through q),

    .. math::
        \ell_i = \frac{1}{G (V - 1)} \sum_{g = 1}^{G} \sum_{v \ne g}
            -\sum_k q^{(g)}_{ik} \log \frac{e^{s^{(v)}_{ik} / T}}{\sum_{k'} e^{s^{(v)}_{ik'} / T}}

    Memory is linear in n and k; a second derivative raises.

    Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments" (arXiv:2006.09882),
    whose code sets the prototypes to unit length before each step, outside of the graph. With ``normalize`` this is
    done here, inside it: same loss, and of their gradient the part along the sphere.

    Args:
        temperature: T, > 0; the initial value if learnable.
        epsilon: of Sinkhorn's algorithm, > 0.
        iterations: of Sinkhorn's algorithm, at least 1.
        global_views: G: the first views, which are assigned; the rest (multi-crop) only predict.
        learnable_temperature: make log T a parameter (``log_temperature``).
        normalize: scale embeddings and prototypes to unit length; if not, they are used as they come.
        reduction: "mean", "sum", or "none" (a loss per image, ``[n]``).
        backend: of the streaming log-sum-exp: "auto", "triton", "blocked" or "reference".
        process_group: as in `Loss`: images, and the queue, are those of all processes, each of which passes its part
            and the same prototypes. No rows travel, only the plan's sums over columns. The prototypes' gradient is
            whole on every process, as that of a learnable temperature.
        exchange: without a choice, as no rows travel.

    Cost:
        operators: per global view the plan's potentials (`sinkhorn`); `swapped_prediction`.
        units: 3 V + G t, of N x K x D: 12 for two views and t = 3, on a CPU down to 8 for small K, where
            exponentials are kept; V more for "none". On a GPU by log-sum-exps: 4 V + G (2 t + 6) = 32.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import SwAVLoss
        >>> prototypes = torch.nn.Parameter(torch.randn(5, 16))
        >>> SwAVLoss(temperature=0.1)(torch.randn(8, 2, 16), prototypes).backward()
        >>> prototypes.grad.shape
        torch.Size([5, 16])
    """

    unsupported = ("exchange",)

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        epsilon: float = 0.05,
        iterations: int = 3,
        global_views: int = 2,
        **common: Unpack[CommonOptions],
    ):
        super().__init__(temperature, **common)
        epsilon = checked_temperature("epsilon", epsilon)
        check_count("iterations", iterations)
        check_count("global_views", global_views)
        self.epsilon, self.iterations, self.global_views = epsilon, iterations, global_views

    def forward(self, embeddings: Tensor, prototypes: Tensor, *, queue: Tensor | None = None) -> Tensor:
        """Return the loss.

        Args:
            embeddings: ``[n, views, d]`` (not scores), the global views first; float64, float32, bfloat16 or float16.
            prototypes: ``[k, d]``, such as an nn.Parameter; they get a gradient.
            queue: ``[m, global views, d]`` embeddings of earlier batches, which take part in Sinkhorn's algorithm (of
                few images alone an equal partition is no good assignment). They get no gradient.

        Returns:
            The loss, float32 (float64 for float64 embeddings).

        Raises:
            ValueError: an argument has the wrong type, shape, dtype, device or value.
        """
        _, exchange, _ = self.join_processes(
            lambda: self._check(embeddings, prototypes, queue),
            {"embeddings": embeddings, "queue": queue},
            lambda: {"prototypes": prototypes},
        )
        z = torch.stack([self.unit(view) for view in embeddings.unbind(1)])
        centers = self.unit(self.shared(prototypes, exchange.group)).to(z.dtype)
        potentials = []
        for g, own in enumerate(z[: self.global_views].detach()):
            pool = own if queue is None else torch.cat((own, self.unit(queue[:, g].detach())))
            plan = {"scale": 1.0 / self.epsilon, "iterations": self.iterations, "backend": self.backend}
            potentials.append(column_potentials(pool, centers.detach(), **plan, group=exchange.group))
        found = swapped_prediction(
            z,
            centers,
            torch.stack(potentials),
            scale=1.0 / self.shared(self.temperature, exchange.group),
            plan_scale=1.0 / self.epsilon,
            reduction="none" if self.reduction == "none" else "sum",
            backend=self.backend,
        )
        found = found / (self.global_views * (z.shape[0] - 1))
        return found if self.reduction == "none" else self.reduce_total(found, z.shape[1], exchange.group)

    def _check(self, embeddings: Tensor, prototypes: Tensor, queue: Tensor | None) -> tuple[int, int]:
        """Numbers of images, and of rows of each in a view."""
        check_tensor("embeddings", embeddings)
        check_floating("embeddings", embeddings)
        least = max(2, self.global_views)
        if embeddings.ndim != 3 or embeddings.shape[1] < least:
            expected = f"shape [n, views, d] with at least {least} views"
            raise ArgumentError(f"embeddings: expected {expected}, got {list(embeddings.shape)}")
        n, _, d = embeddings.shape
        check_matrix("prototypes", prototypes, columns=d)
        check_floating("prototypes", prototypes)
        check_same("prototypes", prototypes, "embeddings", embeddings, dtype=False)
        check_some("prototypes", prototypes)
        if queue is not None:
            check_tensor("queue", queue)
            if queue.ndim != 3 or queue.shape[1:] != (self.global_views, d):
                raise ArgumentError(
                    f"queue: expected shape [m, {self.global_views}, {d}] (of the global views), "
                    f"got {list(queue.shape)}"
                )
            check_same("queue", queue, "embeddings", embeddings)
        return n, 1
