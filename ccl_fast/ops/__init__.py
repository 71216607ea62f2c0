"""Operators: a contract, one dense reference, and backends that agree with it."""

from ccl_fast.ops.edge_similarity import edge_similarity
from ccl_fast.ops.gated_similarity import gated_similarity
from ccl_fast.ops.kmeans.assign import kmeans_assign
from ccl_fast.ops.kmeans.update import kmeans_update
from ccl_fast.ops.logsumexp.operator import cross_entropy, logaddexp, mutual_logsumexp, streaming_logsumexp
from ccl_fast.ops.row_dot import row_dot
from ccl_fast.ops.rowwise.histogram import similarity_histogram
from ccl_fast.ops.rowwise.max_by_id import max_by_id
from ccl_fast.ops.rowwise.pairs import map_row_blocks, pair_logsumexp
from ccl_fast.ops.rowwise.softmax import expected_similarity, logsumexp_excluding, topk_logsumexp
from ccl_fast.ops.rowwise.topk import streaming_topk
from ccl_fast.ops.same_id_similarity import same_id_similarity
from ccl_fast.ops.segment_gram import segment_gram
from ccl_fast.ops.soft_rank_mass import soft_rank_mass
from ccl_fast.ops.transport.assignment_mass import assignment_mass, log_assignment_mass
from ccl_fast.ops.transport.distilled_prediction import distilled_prediction
from ccl_fast.ops.transport.sinkhorn import barycentric_projection, sinkhorn
from ccl_fast.ops.transport.swapped_prediction import swapped_prediction

__all__ = [
    "assignment_mass",
    "barycentric_projection",
    "cross_entropy",
    "distilled_prediction",
    "edge_similarity",
    "expected_similarity",
    "gated_similarity",
    "kmeans_assign",
    "kmeans_update",
    "log_assignment_mass",
    "logaddexp",
    "logsumexp_excluding",
    "map_row_blocks",
    "max_by_id",
    "mutual_logsumexp",
    "pair_logsumexp",
    "row_dot",
    "same_id_similarity",
    "segment_gram",
    "similarity_histogram",
    "sinkhorn",
    "soft_rank_mass",
    "streaming_logsumexp",
    "streaming_topk",
    "swapped_prediction",
    "topk_logsumexp",
]
