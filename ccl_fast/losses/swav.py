"""Contrast of cluster assignments between views."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ccl_fast.checks import check_count, check_floating, check_matrix, check_positive, check_same
from ccl_fast.errors import ArgumentError
from ccl_fast.losses.contrast import ContrastiveLoss
from ccl_fast.ops import swapped_prediction
from ccl_fast.ops.transport.sinkhorn import column_potentials


class SwAVLoss(ContrastiveLoss):
    r"""Predict the assignment of one view to prototypes from the other views of the same image.

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
        process_group: as in `CCLLoss`: images, and queues, are those of all processes, each of which passes its part
            and the same prototypes. No rows travel, only the plan's sums over columns. The prototypes' gradient is
            whole on every process, as that of a learnable temperature.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        iterations: int = 3,
        global_views: int = 2,
        learnable_temperature: bool = False,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str = "auto",
        process_group: ProcessGroup | str | None = None,
    ):
        super().__init__(temperature, learnable_temperature, normalize, reduction, backend, process_group)
        check_positive("epsilon", epsilon)
        check_count("iterations", iterations)
        check_count("global_views", global_views)
        self.epsilon, self.iterations, self.global_views = epsilon, iterations, global_views

    def extra_repr(self) -> str:
        own = f"epsilon={self.epsilon}, iterations={self.iterations}, global_views={self.global_views}"
        return f"{own}, {super().extra_repr()}"

    @property
    def settings(self) -> dict:
        own = ("epsilon", "iterations", "global_views")
        return super().settings | {name: getattr(self, name) for name in own}

    def forward(self, views: Sequence[Tensor], prototypes: Tensor, queues: Sequence[Tensor] | None = None) -> Tensor:
        """
        Args:
            views: V tensors ``[n, d]``: embeddings (not scores), row i of each from image i, the global views first;
                float64, float32, bfloat16 or float16. (Of embeddings [n, views, d]: ``embeddings.unbind(1)``.)
            prototypes: ``[k, d]``, such as an nn.Parameter; they get a gradient.
            queues: for each global view ``[m, d]`` embeddings of earlier batches, which take part in Sinkhorn's
                algorithm (of few images alone an equal partition is no good assignment). They get no gradient.

        Returns:
            The loss, float32 (float64 for float64 embeddings).

        Raises:
            ValueError: an argument has the wrong type, shape, dtype, device or value.
        """
        _, exchange, _ = self.meet(
            lambda: self._check(views, prototypes, queues),
            {"views": views, "queues": queues},
            lambda: {"prototypes": prototypes},
        )
        z = torch.stack([self.unit(view) for view in views])
        centers = self.unit(self.shared(prototypes, exchange)).to(z.dtype)
        peers = None if exchange is None else exchange.peers
        potentials = []
        for g, own in enumerate(z[: self.global_views].detach()):
            pool = own if queues is None else torch.cat((own, self.unit(queues[g].detach())))
            plan = {"scale": 1.0 / self.epsilon, "iterations": self.iterations, "backend": self.backend}
            potentials.append(column_potentials(pool, centers.detach(), **plan, peers=peers))
        losses = swapped_prediction(
            z,
            centers,
            torch.stack(potentials),
            scale=1.0 / self.shared(self.temperature, exchange),
            plan_scale=1.0 / self.epsilon,
            backend=self.backend,
        )
        losses = losses / (self.global_views * (len(views) - 1))
        return self.reduce(losses, torch.ones_like(losses, dtype=torch.bool), losses.shape, exchange)

    def _check(self, views: Sequence[Tensor], prototypes: Tensor, queues: Sequence[Tensor] | None) -> tuple[int, int]:
        """Numbers of images, and of rows of each in a view."""
        if isinstance(views, Tensor) or len(views) < max(2, self.global_views):
            got = "a tensor" if isinstance(views, Tensor) else f"{len(views)}"
            raise ArgumentError(
                f"views: expected a sequence of at least {max(2, self.global_views)} tensors, got {got}"
            )
        check_matrix("views[0]", views[0])
        check_floating("views[0]", views[0])
        n, d = views[0].shape
        for i, view in enumerate(views[1:], start=1):
            check_matrix(f"views[{i}]", view, columns=d)
            check_same(f"views[{i}]", view, "views[0]", views[0])
            if len(view) != n:
                raise ArgumentError(f"views[{i}]: expected {n} rows (those of views[0]), got {len(view)}")
        check_matrix("prototypes", prototypes, columns=d)
        check_floating("prototypes", prototypes)
        check_same("prototypes", prototypes, "views[0]", views[0], dtype=False)
        if len(prototypes) == 0:
            raise ArgumentError("prototypes: expected at least one row, got none")
        if queues is not None:
            if isinstance(queues, Tensor) or len(queues) != self.global_views:
                got = "a tensor" if isinstance(queues, Tensor) else f"{len(queues)}"
                raise ArgumentError(f"queues: expected {self.global_views} tensors, one per global view, got {got}")
            for i, queue in enumerate(queues):
                check_matrix(f"queues[{i}]", queue, columns=d)
                check_same(f"queues[{i}]", queue, "views[0]", views[0])
        return n, 1
