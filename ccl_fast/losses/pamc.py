"""Contrast with clusters as proxies of all their members."""

from typing import Literal, Unpack, get_args

import torch
from torch import Tensor

from ccl_fast.checks import check_choice, check_has_values
from ccl_fast.distributed import Exchange
from ccl_fast.losses.base import CommonOptions, Loss
from ccl_fast.losses.batch import check_ids, check_queries
from ccl_fast.ops import row_dot, streaming_logsumexp
from ccl_fast.ops.ids import consecutive_ids, separate_unassigned
from ccl_fast.ops.precision import accumulation_dtype

Form = Literal["node", "cluster"]
FORMS: tuple[Form, ...] = get_args(Form)


class PamCLoss(Loss):
    r"""InfoNCE with all negatives at the cost of the clusters, each of which stands for its members by their mean.

    With unit queries q, unit keys k (row i of both is one sample), :math:`n_a` the size of cluster a and
    :math:`\bar q_a, \bar k_a` the means of its queries and keys (not scaled to unit length again):

    .. math::
        \text{node:}\quad & \ell_i = \log \sum_a n_a e^{\langle q_i, \bar k_a \rangle / T}
            - \langle q_i, k_i \rangle / T \\
        \text{cluster:}\quad & \ell_i = \log \sum_{a \ne b} n_a n_b e^{\langle \bar q_a, \bar k_b \rangle / T}
            - \langle q_i, k_i \rangle / T

    A cluster's term is its members' at first order, and by convexity not above it: "node" is at most InfoNCE of
    queries against keys, equal to it where every cluster is one sample (or members are equal), and so is "cluster" to
    the sum over all pairs of different samples. Gradients flow through the means. Memory is linear in n.

    The proxy of Kulatilleke, Portmann, Chandra, "Efficient block contrastive learning via parameter-free meta-node
    approximation" (arXiv:2209.14067), in this project's reading: the paper sums negatives over pairs of clusters
    ("cluster"), with positives from a graph's neighbours; its code takes cosines of the clusters' sums, without sizes.
    The form "node" is this project's own.

    Args:
        temperature: T, > 0; the initial value if learnable.
        form: "node" (each anchor against the clusters) or "cluster" (one sum for all anchors).
        learnable_temperature, normalize, reduction, backend, process_group: as in `Loss`. Of several processes the
            ids and the clusters' sums travel, which every process holds, no rows: there is no exchange to choose.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import PamCLoss
        >>> loss = PamCLoss(temperature=0.2)(torch.randn(8, 16), torch.randn(8, 16), torch.arange(8) % 3)
        >>> loss.shape
        torch.Size([])
    """

    unsupported = ("exchange",)

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        form: Form = "node",
        **common: Unpack[CommonOptions],
    ):
        check_choice("form", form, FORMS)
        super().__init__(temperature, **common)
        self.form = form

    def forward(self, queries: Tensor, keys: Tensor, cluster_ids: Tensor) -> Tensor:
        """Return the loss.

        Args:
            queries: ``[n, d]``, the anchors; float64, float32, bfloat16, float16.
            keys: ``[n, d]``; row i is the positive of query i.
            cluster_ids: ``[n]``, integers; -1 is unassigned: a cluster of its own.

        Returns:
            The loss, float32 (float64 for float64 embeddings). In the form "cluster" a batch of a single cluster has
            no negatives, and its loss is 0.

        Raises:
            ValueError: an argument has the wrong type, shape, dtype, device or value.
            IndexError: a cluster id is below -1 (on a GPU: an assertion on the device).
        """

        def check() -> tuple[int, int]:
            check_queries(queries, keys, required=("keys",))
            check_ids("cluster_ids", cluster_ids, queries)
            check_has_values("cluster_ids", cluster_ids, "which decide how many clusters there are")
            return queries.shape[0], 1

        n, exchange, first = self.join_processes(check, {"queries": queries, "keys": keys})
        scale = 1.0 / self.shared(self.temperature, exchange.group)
        q, k = self.unit(queries), self.unit(keys)
        ids = exchange.gather(separate_unassigned(cluster_ids.long(), first))
        # The number of clusters decides how much is computed, so the host must know it.
        group = consecutive_ids(ids)
        size = group.bincount().to(accumulation_dtype(q))
        group = group[first : first + n]
        options = {"scale": scale, "key_bias": size.log(), "backend": self.backend}
        key_means = _means(k, group, size, exchange)
        if self.form == "node":
            logsumexp = streaming_logsumexp(q, key_means, **options)
        else:
            each = torch.arange(size.shape[0], device=q.device)
            to_others = streaming_logsumexp(
                _means(q, group, size, exchange), key_means, q_ids=each, k_ids=each, candidates="other_id", **options
            )
            logsumexp = (to_others + size.log()).logsumexp(0).expand(n)
        has_negative = logsumexp != -torch.inf
        losses = logsumexp.masked_fill(~has_negative, 0.0) - row_dot(q, k) * scale
        return self.reduce(losses, has_negative, queries.shape[:1], exchange.group)


def _means(x: Tensor, group: Tensor, size: Tensor, exchange: Exchange) -> Tensor:
    sums = size.new_zeros(size.shape[0], x.shape[1]).index_add(0, group, x.to(size.dtype))
    return (exchange.group.sum_with_gradient(sums) / size[:, None]).to(x.dtype)
