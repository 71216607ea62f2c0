"""Contrast with clusters as proxies of all their members."""

import math
from typing import Literal, Unpack, get_args

import torch
from torch import Tensor

from ccl_fast.checks import check_choice, check_floating, check_has_values, check_matrix, check_same
from ccl_fast.distributed import Exchange
from ccl_fast.errors import ArgumentError
from ccl_fast.losses.base import CommonOptions, Loss
from ccl_fast.losses.batch import check_ids, check_queries
from ccl_fast.losses.pairs import check_graph, entries
from ccl_fast.ops import logaddexp, row_dot, streaming_logsumexp
from ccl_fast.ops.ids import consecutive_ids, separate_unassigned
from ccl_fast.ops.precision import accumulation_dtype

Form = Literal["meta-node", "node", "cluster"]
FORMS: tuple[Form, ...] = get_args(Form)

# Of what the authors add inside of the logarithms.
LOG_EPSILON = math.log(1e-10)


class PamCLoss(Loss):
    r"""InfoNCE with all negatives at the cost of the clusters, each of which stands for its members.

    The form "meta-node" is that of the authors' code. With :math:`c_{ab}` the cosines between the clusters' sums of the
    rows as they come, :math:`s_{ij}` those between rows, both 0 of anything with itself, :math:`A_{ij} \ge 0` the
    weight of j as a positive of i and K the number of clusters:

    .. math::
        \ell_i = \frac{1}{K} \sum_a \log \Big( \sum_b e^{c_{ab} / T} + \epsilon \Big)
            - \log \Big( \sum_j A_{ij} e^{s_{ij} / T} + \epsilon \Big), \qquad \epsilon = 10^{-10}

    The rows are a graph's nodes with A from its edges, or both views of every sample, with A of 1 for the other view.
    In the other two forms sizes count, and clusters stand by their means. With unit queries q, unit keys k (row i of
    both is one sample), :math:`n_a` the size of cluster a and :math:`\bar q_a, \bar k_a` the means of its queries and
    keys (not scaled to unit length again):

    .. math::
        \text{node:}\quad & \ell_i = \log \sum_a n_a e^{\langle q_i, \bar k_a \rangle / T}
            - \langle q_i, k_i \rangle / T \\
        \text{cluster:}\quad & \ell_i = \log \sum_{a \ne b} n_a n_b e^{\langle \bar q_a, \bar k_b \rangle / T}
            - \langle q_i, k_i \rangle / T

    There a cluster's term is its members' at first order, and by convexity not above it: "node" is at most InfoNCE of
    queries against keys, equal to it where every cluster is one sample (or members are equal), and so is "cluster" to
    the sum over all pairs of different samples. Gradients flow through sums and means. Memory is linear in n and in
    the edges.

    Kulatilleke, Portmann, Chandra, "Efficient block contrastive learning via parameter-free meta-node approximation"
    (arXiv:2209.14067), whose text has the form "cluster"; "node" is this project's own. The authors' code multiplies
    similarities by tau.

    Args:
        temperature: T, > 0; the initial value if learnable.
        form: "meta-node" (clusters against each other, by their sums), "node" (each anchor against the clusters) or
            "cluster" (one sum for all anchors).
        normalize: of "meta-node": without it similarities are inner products of the sums and of the rows.
        learnable_temperature, reduction, backend, process_group: as in `Loss`. Of several processes the ids and the
            clusters' sums travel, which every process holds, no rows: there is no exchange to choose.

    Cost:
        operators: LSE of sums against each other; `edge_similarity`; LSE over means with key bias log n_k; of means
            over means, `candidates="other_id"`.
        units: 2 of K x K x D, and 3 E x D; 4 of N x K x D; 4 of K x K x D.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import PamCLoss
        >>> loss_fn, clusters = PamCLoss(temperature=0.2), torch.arange(8) % 3
        >>> loss_fn(torch.randn(8, 16), torch.randn(8, 16), clusters).shape
        torch.Size([])
        >>> ring = torch.eye(8).roll(1, 0).to_sparse()
        >>> loss_fn(torch.randn(8, 16), None, clusters, positives=ring).shape
        torch.Size([])
    """

    unsupported = ("exchange",)

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        form: Form = "meta-node",
        **common: Unpack[CommonOptions],
    ):
        check_choice("form", form, FORMS)
        super().__init__(temperature, **common)
        self.form = form

    def forward(
        self, queries: Tensor, keys: Tensor | None, cluster_ids: Tensor, *, positives: Tensor | None = None
    ) -> Tensor:
        """Return the loss.

        Args:
            queries: ``[n, d]``, the anchors; float64, float32, bfloat16, float16.
            keys: ``[n, d]``; row i is the positive of query i. None with ``positives``: the queries are all rows.
            cluster_ids: ``[n]``, integers; -1 is unassigned: a cluster of its own.
            positives: ``[n, n]`` sparse, CSR or COO, floating point, A, in the place of keys; it gets no gradient. For
                the form "meta-node" on one process.

        Returns:
            The loss, float32 (float64 for float64 embeddings). With reduction "none" a loss per row: ``[n, 2]`` for
            queries and keys in the form "meta-node", where both are anchors, else ``[n]``. In the form "cluster" a
            batch of a single cluster has no negatives, and its loss is 0.

        Raises:
            ValueError: an argument has the wrong type, shape, dtype, device or value.
            IndexError: a cluster id is below -1 (on a GPU: an assertion on the device).
        """
        rows = {"queries": queries, "keys": keys}
        n, exchange, first = self.join_processes(lambda: self._check(queries, keys, cluster_ids, positives), rows)
        scale = 1.0 / self.shared(self.temperature, exchange.group)
        ids = exchange.gather(separate_unassigned(cluster_ids.long(), first))
        # The number of clusters decides how much is computed, so the host must know it.
        group = consecutive_ids(ids)
        size = group.bincount().to(accumulation_dtype(queries))
        group = group[first : first + n]
        if self.form == "meta-node":
            meta_nodes = (
                _sums(queries, group, size, exchange)
                if keys is None
                else _sums(torch.cat((queries, keys)), group.repeat(2), size, exchange)
            )
            between = self._between_meta_nodes(self.unit(meta_nodes), scale)
            attraction = self._attraction(queries, keys, positives, scale)
            return self.reduce(between - attraction, shape=attraction.shape, group=exchange.group)
        assert keys is not None
        q, k = self.unit(queries), self.unit(keys)
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

    def _check(
        self, queries: Tensor, keys: Tensor | None, cluster_ids: Tensor, positives: Tensor | None
    ) -> tuple[int, int]:
        if positives is None:
            check_queries(queries, keys, required=("keys",))
        else:
            if self.form != "meta-node" or self.process_group is not None:
                where = f"form={self.form!r}" if self.form != "meta-node" else "process_group"
                raise ArgumentError(f"positives: expected None with {where}, got a matrix")
            if keys is not None:
                raise ArgumentError("keys: expected None with positives, got keys")
            check_matrix("queries", queries)
            check_floating("queries", queries)
            check_graph("positives", positives, len(queries))
            check_same("positives", positives, "queries", queries, dtype=False)
        check_ids("cluster_ids", cluster_ids, queries)
        check_has_values("cluster_ids", cluster_ids, "which decide how many clusters there are")
        return queries.shape[0], 1

    def _between_meta_nodes(self, z: Tensor, scale: float | Tensor) -> Tensor:
        """The mean over the clusters of the logarithms, a similarity of 0 to itself in each."""
        others = streaming_logsumexp(z, scale=scale, backend=self.backend)
        itself = others.new_tensor(math.log1p(1e-10))
        of_each = logaddexp(others, itself.expand_as(others))
        return of_each.sum() / torch.ones_like(of_each).sum().clamp(min=1)

    def _attraction(
        self, queries: Tensor, keys: Tensor | None, positives: Tensor | None, scale: float | Tensor
    ) -> Tensor:
        """Of every row the logarithm over its positives."""
        if positives is None:
            assert keys is not None
            logits = (row_dot(self.unit(queries), self.unit(keys)) * scale)[:, None].expand(-1, 2)
        else:
            edges, weights = entries(positives)
            z = self.unit(queries)
            logits = edges.logits(z, z, scale).masked_fill(edges.diagonal, 0.0)
            logits = edges.logsumexp(logits, len(z), weights.to(logits.dtype))
        return logaddexp(logits, torch.full_like(logits, LOG_EPSILON))


def _means(x: Tensor, group: Tensor, size: Tensor, exchange: Exchange) -> Tensor:
    return (_sums(x, group, size, exchange) / size[:, None]).to(x.dtype)


def _sums(x: Tensor, group: Tensor, size: Tensor, exchange: Exchange) -> Tensor:
    """Of the rows of every cluster, on all processes."""
    sums = size.new_zeros(size.shape[0], x.shape[1]).index_add(0, group, x.to(size.dtype))
    return exchange.group.sum_with_gradient(sums)
