"""Random arguments of the public API, wrong, odd and right: the reference's value, or an error that names one."""

import inspect
import random
import re

import numpy as np
import pytest
import torch

from ccl_fast import losses, metrics, ood, ops

pytestmark = pytest.mark.usefixtures("one_thread")


def rows(n, *shape):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(n))


def ids(n):
    return torch.arange(n) % 3


COMMON = {"temperature": 0.2, "normalize": True, "reduction": "mean"}


def loss(cls, own=None, **forward):
    """A loss, or another module, as one function of its options and of what its `forward` takes."""

    def call(**given):
        split = {name: given.pop(name) for name in forward if name in given}
        return cls(**given)(**split)

    call.names = [*inspect.signature(cls).parameters, *inspect.signature(cls.forward).parameters]
    unsupported = getattr(cls, "unsupported", ("backend", *COMMON))
    call.backend = "backend" not in unsupported
    return call, {k: v for k, v in COMMON.items() if k not in unsupported} | (own or {}) | forward


def op(function, **given):
    def call(**given):
        return function(**given)

    call.names = list(inspect.signature(function).parameters)
    call.backend = "backend" in call.names
    return call, given


def detector(cls, **own):
    """An OOD detector that is fitted and scores, as one function of its options, and of what it is given."""

    def call(features, labels, new, **given):
        return cls(**given).fit_features(features, labels).predict_features(new)

    call.names = [*inspect.signature(cls).parameters, "x", "y"]
    call.backend = False
    return call, own | {"features": rows(20, 5), "labels": torch.arange(20) % 2, "new": rows(6, 5)}


VIEWS = rows(7, 2, 5)
TWO = {"queries": rows(7, 5), "keys": rows(8, 5)[:7]}
CALLS = {
    "ccl": loss(losses.CCLLoss, {"center_weight": 0.5, "instance_weight": 0.0, "center_temperature": 0.3},
                embeddings=VIEWS, cluster_ids=ids(7), centers=rows(3, 5)),
    "supcon": loss(losses.SupConLoss, embeddings=rows(7, 5), labels=ids(7)),
    "ntxent": loss(losses.NTXentLoss, embeddings=rows(7, 5), labels=rows(8, 5)[:7]),
    "infonce": loss(losses.InfoNCELoss, {"symmetric": True}, **TWO, negatives=rows(9, 5)),
    "swav": loss(losses.SwAVLoss, {"epsilon": 0.05}, embeddings=VIEWS, prototypes=rows(3, 5)),
    "hard": loss(losses.HardContrastiveLoss, {"alpha": 0.5, "symmetric": True}, **TWO),
    "centre negatives": loss(losses.CenterNegativesLoss, embeddings=VIEWS, cluster_ids=ids(7), centers=rows(3, 5)),
    "meow": loss(losses.MEOWLoss, {"symmetric": True, "weigh_positive": True}, queries=VIEWS, cluster_ids=ids(7)),
    "mcl": loss(losses.MCLLoss, {"symmetric": True}, queries=VIEWS, cluster_ids=[ids(7)]),
    "cmim": loss(losses.CMIMLoss, embeddings=rows(7, 5)),
    "groco": loss(losses.GroCoLoss, {"num_negatives": 4, "steepness": 1.0}, embeddings=VIEWS),
    "conr": loss(losses.ConRLoss, {"window": 1.0, "push": 0.01, "count_masked": False}, embeddings=rows(7, 5),
                 targets=rows(7), predictions=rows(8)[:7], weights=rows(7).sigmoid()),
    "gated pairs": loss(losses.GatedPairLoss, embeddings=rows(7, 5), labels=ids(7), partner_labels=ids(7).flip(0),
                        gates=rows(7, 5).sigmoid()),
    "list contrast": loss(losses.ListContrastLoss, embeddings=rows(7, 5), positives=torch.arange(7)[:, None] // 2,
                          negatives=torch.arange(14).view(7, 2) % 7),
    "subspace margin": loss(losses.SubspaceMarginLoss, {"boundary": 1.2, "margin": 0.2, "least_distance": 0.5},
                            embeddings=rows(7, 6), labels=ids(7)),
    "pixpro": loss(losses.PixProLoss, {"ratio": 0.7}, queries=rows(2, 3, 3, 4), keys=rows(3, 3, 3, 4)[:2],
                   boxes=rows(2, 4).sigmoid(), key_boxes=rows(3, 4)[:2].sigmoid()),
    "csgcl": loss(losses.CSGCLLoss, {"strength_weight": 1.0}, **TWO, strength=rows(7).sigmoid()),
    "lightgcl": loss(losses.LightGCLLoss, {"positive_limit": 5.0}, **TWO, nodes=torch.arange(7)),
    "beclr": loss(losses.BECLRLoss, {"negative_weight": 0.1}, embeddings=VIEWS, predictions=VIEWS.flip(0),
                  targets=VIEWS.flip(1)),
    "slotcon": loss(losses.SlotConLoss, {"teacher_temperature": 0.1, "slot_temperature": 0.2,
                                         "distillation_weight": 0.5}, queries=VIEWS, keys=VIEWS.flip(0),
                    prototypes=rows(3, 5), teacher_prototypes=rows(3, 5), teacher_center=rows(3)),
    "maxsim": loss(losses.MaxSimLoss, **TWO, query_ids=ids(7), key_ids=ids(7), num_ids=4),
    "pamc": loss(losses.PamCLoss, **TWO, cluster_ids=ids(7)),
    "adameow": loss(losses.AdaMEOWLoss, queries=VIEWS, cluster_ids=ids(7), weights=rows(3, 3).sigmoid()),
    "cacr": loss(losses.CACRLoss, {"t_positive": 1.0, "t_negative": 2.0, "rbf": None}, embeddings=VIEWS, labels=ids(7)),
    "coding rate": loss(losses.CodingRateLoss, {"eps": 0.5}, embeddings=VIEWS, cluster_ids=ids(7)),
    "deepcluster": loss(losses.DeepClusterV2Loss, embeddings=VIEWS, cluster_ids=[ids(7)], centers=[rows(3, 5)]),
    "protogcd": loss(losses.ProtoGCDLoss, {"teacher_temperature": 0.1, "hard_share": 0.5, "entropy_weight": 1.0,
                                           "separation_weight": 0.1, "supervised_weight": 0.35},
                     embeddings=VIEWS, prototypes=rows(3, 5), labels=ids(7)),
    "protonce": loss(losses.ProtoNCELoss, {"in_batch_negatives": True}, queries=VIEWS, cluster_ids=[ids(7)],
                     centers=[rows(3, 5)], center_temperature=[rows(3).abs() + 0.1], negatives=rows(9, 5)),
    "feature transformation": loss(losses.FeatureTransformationLoss, {"positive_alpha": 2.0, "per_dimension": False},
                                   **TWO, negatives=rows(9, 5), generator=None),
    "interclr": loss(losses.InterCLRLoss, {"num_negatives": 4, "pool": 0.5, "margin": -0.5}, **TWO,
                     negatives=rows(9, 5), bank=rows(12, 5), bank_cluster_ids=ids(12), indices=torch.arange(7)),
    "mlc": loss(losses.MLCLoss, {"eps": 0.5}, embeddings=VIEWS, heads=VIEWS.flip(0)[:, :, :3]),
    "mlcd": loss(losses.MLCDLoss, {"sample": 0.5, "margin": 0.1, "margin_form": "cosface"}, embeddings=rows(7, 5),
                 cluster_ids=torch.stack((ids(7), ids(7) + 1), 1), prototypes=rows(4, 5)),
    "mochi": loss(losses.MoCHiLoss, {"num_hardest": 4, "num_synthetic": 3, "num_with_query": 2}, **TWO,
                  negatives=rows(9, 5)),
    "sbcl": loss(losses.SBCLLoss, {"class_weight": 0.3, "base_temperature": 0.1, "own_views": True}, embeddings=VIEWS,
                 labels=ids(7), cluster_ids=torch.arange(7) % 2, class_temperature=rows(3).abs() + 0.1),
    "scgc": loss(losses.SCGCLoss, embeddings=rows(7, 5), influence=rows(7, 7).relu().to_sparse_csr()),
    "sepclr": loss(losses.SepCLRLoss, {"salient_weight": 1.0, "independence_weight": 1.0}, embeddings=VIEWS,
                   salient=rows(7, 2, 4), is_target=torch.arange(7) > 3),
    "whitenedcse": loss(losses.WhitenedCSELoss, {"groups": 1, "eps": 1e-5}, embeddings=rows(17, 2, 4),
                        shuffles=torch.arange(4).repeat(2, 1)),
    "supcon references": loss(losses.SupConLoss, {"unassigned": None, "form": "inside"}, embeddings=rows(7, 5),
                              labels=ids(7), ref_emb=rows(9, 5), ref_labels=ids(9)),
    "supcon pairs": loss(losses.SupConLoss, {"form": "outside"}, embeddings=rows(7, 5),
                         indices_tuple=(torch.arange(3), torch.arange(3) + 3, torch.arange(3), torch.arange(3) + 4)),
    "supcon mask": loss(losses.SupConLoss, {"contrast_mode": "one"}, embeddings=VIEWS, mask=torch.eye(7)),
    "ntxent references": loss(losses.NTXentLoss, {"unassigned": -1}, embeddings=rows(7, 5), labels=ids(7),
                              ref_emb=rows(9, 5), ref_labels=ids(9)),
    "influence_matrix": op(losses.influence_matrix, adjacency=(rows(7, 7) > 0).float().to_sparse_csr(), hops=2,
                           cumulative=True, normalization="rows"),
    "extrapolate_positives": op(losses.extrapolate_positives, queries=rows(7, 5), keys=rows(8, 5)[:7], alpha=2.0,
                                per_dimension=True, generator=None),
    "interpolate_negatives": op(losses.interpolate_negatives, negatives=rows(9, 5), alpha=1.6, per_dimension=False),
    "nearest_centers": op(losses.nearest_centers, embeddings=rows(7, 5), centers=rows(3, 5), num_centers=2),
    "whitening": op(losses.shuffled_group_whitening, x=rows(17, 4), groups=2, eps=1e-5, through_covariance=True),
    "pair weights": loss(losses.PairWeights, {"features": 5, "hidden": 4}, centers=rows(3, 5),
                         key_centers=rows(4, 5)[:3]),
    "svd view": loss(losses.SVDView, {"adjacency": rows(7, 5).abs(), "rank": 2, "iterations": 1}, embeddings=rows(5, 3),
                     transposed=False),
    "uniformity": op(metrics.uniformity, embeddings=rows(7, 5), t=2.0),
    "tolerance": op(metrics.tolerance, embeddings=rows(7, 5), labels=ids(7)),
    "cluster_quality": op(metrics.cluster_quality, cluster_ids=ids(7), labels=torch.arange(7) % 2),
    "score_histogram": op(metrics.score_histogram, **TWO, negatives=rows(9, 5), bins=5, range=(-1.0, 1.0)),
    "auroc": op(ood.auroc, scores=rows(7), is_ood=torch.arange(7) > 3),
    "aupr": op(ood.aupr, scores=rows(7), is_ood=torch.arange(7) > 3, positive="ood"),
    "fpr95": op(ood.fpr95, scores=rows(7), is_ood=torch.arange(7) > 3, positive="id"),
    "ood_metrics": op(ood.ood_metrics, scores=rows(7), is_ood=torch.arange(7) > 3),
    "nearest neighbour": detector(ood.NearestNeighbor, k=2),
    "mahalanobis": detector(ood.Mahalanobis, n_clusters=2, shrinkage=0.1, normalize=True, seed=0),
    "nearest centre": detector(ood.NearestCenter, n_clusters=2, seed=0),
    "cosine and norm": detector(ood.CosineNorm),
    "ensemble": detector(ood.Ensemble, detectors=[ood.NearestNeighbor(), ood.CosineNorm()], weights=[1.0, 2.0],
                         folds=2, seed=0),
    "linear separation": detector(ood.LinearSeparation, seed=ood.NearestNeighbor(), posterior=0.5, folds=2,
                                  random_state=0),
    "prototype score": detector(ood.PrototypeScore, score="energy", prototypes=rows(3, 5), n_clusters=2,
                                temperature=0.2, seed=0),
    "streaming_logsumexp": op(ops.streaming_logsumexp, q=rows(7, 5), k=rows(9, 5), scale=2.0, key_bias=rows(9),
                              q_ids=ids(7), k_ids=ids(9), candidates="all", return_same=False),
    "mutual_logsumexp": op(ops.mutual_logsumexp, q=rows(7, 5), k=rows(9, 5), scale=2.0, q_ids=ids(7), k_ids=ids(9)),
    "topk_logsumexp": op(ops.topk_logsumexp, q=rows(7, 5), k=rows(9, 5), scale=2.0, topk=2),
    "expected_similarity": op(ops.expected_similarity, q=rows(7, 5), k=rows(9, 5), scale=2.0, key_bias=rows(9)),
    "logsumexp_excluding": op(ops.logsumexp_excluding, q=rows(7, 5), k=rows(9, 5), excluded=ids(7)[:, None], scale=2.0),
    "gated_similarity": op(ops.gated_similarity, q=rows(7, 5), gates=rows(8, 5)[:7].sigmoid(), k=rows(9, 5)),
    "pair_logsumexp": op(ops.pair_logsumexp, q=rows(7, 5), k=rows(9, 5), scale=2.0,
                         term=lambda a, b: -(a.double() @ b.double().T),
                         q_attributes=rows(7, 2), k_attributes=rows(9, 2)),
    "soft_rank_mass": op(ops.soft_rank_mass, s=rows(7, 5), n_top=2, steepness=1.0),
    "streaming_topk": op(ops.streaming_topk, q=rows(7, 5), k=rows(9, 5), topk=2, candidates="all", ceiling=0.5),
    "similarity_histogram": op(ops.similarity_histogram, q=rows(7, 5), k=rows(9, 5), bins=4, range=(-1.0, 1.0)),
    "edge_similarity": op(ops.edge_similarity, q=rows(7, 5), k=rows(9, 5), crow_indices=torch.arange(8),
                          col_indices=torch.arange(7)),
    "same_id_similarity": op(ops.same_id_similarity, z=rows(7, 5), ids=ids(7)),
    "segment_gram": op(ops.segment_gram, z=rows(7, 5), ids=ids(7), n_clusters=3),
    "segment_gram by weights": op(ops.segment_gram, z=rows(7, 5), weights=rows(7, 3)),
    "row_dot": op(ops.row_dot, a=rows(7, 5), b=rows(7, 5)),
    "sinkhorn": op(ops.sinkhorn, z=rows(7, 5), centers=rows(3, 5), scale=2.0, iterations=2),
    "swapped_prediction": op(ops.swapped_prediction, z=VIEWS.transpose(0, 1), centers=rows(3, 5),
                             potentials=rows(2, 3), scale=2.0, plan_scale=3.0),
    "distilled_prediction": op(ops.distilled_prediction, z=rows(7, 5), centers=rows(3, 5), teacher_z=rows(7, 5),
                               teacher_centers=rows(3, 5), scale=2.0, teacher_scale=3.0, potentials=rows(3),
                               hard=torch.arange(7) > 3),
    "max_by_id": op(ops.max_by_id, q=rows(7, 5), k=rows(9, 5), k_ids=ids(9), num_ids=4),
    "assignment_mass": op(ops.assignment_mass, z=rows(7, 5), centers=rows(3, 5), scale=2.0),
}  # fmt: skip
ANYTHING = [
    None, "False", "mean", -1, 0, 1, True, 1.5, float("nan"), float("inf"), 1e-320, 1e308, 10**400, [], {}, object(),
    np.float32(0.25), np.zeros(3), torch.tensor(0.5), torch.zeros(0), torch.zeros(2, 2, 2, 2),
]  # fmt: skip


def inference(x):
    with torch.inference_mode():
        return x.clone()


OF_TENSORS = {
    "float64": torch.Tensor.double, "float16": torch.Tensor.half, "int64": torch.Tensor.long, "bool": torch.Tensor.bool,
    "complex": lambda x: x + 0j, "int8": lambda x: x.to(torch.int8), "float8": lambda x: x.to(torch.float8_e4m3fn),
    "sparse": torch.Tensor.to_sparse, "meta": lambda x: x.to("meta"), "numpy": torch.Tensor.numpy,
    "list": torch.Tensor.tolist, "strided": lambda x: torch.stack((x, x), -1)[..., 0], "inference": inference,
    "fewer": lambda x: x[:-1], "none": lambda x: x[:0], "one": lambda x: x[:1], "flat": torch.Tensor.flatten,
    "deeper": lambda x: x[None], "narrow": lambda x: x[..., :0], "gradient":
    lambda x: x.clone().requires_grad_() if x.is_floating_point() else x, "below":
    lambda x: x.long() - 10 if x.dtype == torch.bool else x - 10,
}  # fmt: skip


def mutated(value, chance):
    if isinstance(value, list | tuple) and value and chance.random() < 0.7:
        place = chance.randrange(len(value))
        return type(value)(mutated(x, chance) if at == place else x for at, x in enumerate(value))
    if isinstance(value, torch.Tensor) and chance.random() < 0.7:
        change = OF_TENSORS[chance.choice(list(OF_TENSORS))]
        if value.layout == torch.strided:
            return change(value)
        changed = change(value.to_dense())
        is_matrix = isinstance(changed, torch.Tensor) and changed.ndim == 2 and not changed.is_meta
        return changed.to_sparse_csr() if is_matrix and changed.layout == torch.strided else changed
    return chance.choice(ANYTHING)


def outcome(call, given):
    """Values, or the error's words."""
    try:
        with torch.random.fork_rng():
            found = call(**given)
    except (ValueError, IndexError) as error:
        return str(error)
    return found if isinstance(found, tuple) else (found,)


# The moments of no pairs.
NAN_IS_MEANT = {"score_histogram"}


def is_tame(value):
    """Tell whether an argument holds no number from which NaN may follow."""
    if isinstance(value, list | tuple):
        return all(map(is_tame, value))
    if isinstance(value, torch.Tensor):
        return value.is_meta or not value.is_floating_point() or bool(value.to_dense().double().isfinite().all())
    return not isinstance(value, int | float) or 1e-30 < abs(value) < 1e30 or value == 0


def check(number):
    chance = random.Random(number)
    name = chance.choice(list(CALLS))
    call, given = CALLS[name][0], dict(CALLS[name][1])
    changed = chance.sample(list(given), chance.choice((1, 1, 2)))
    for argument in changed:
        given[argument] = mutated(given[argument], chance)
    told = f"{number}: {name} with " + ", ".join(f"{x}={given[x]!r:.200}" for x in changed)
    try:
        found = outcome(call, given)
    except Exception as error:
        raise AssertionError(f"{told}: {type(error).__name__}: {str(error)[:200]}") from error
    if isinstance(found, str):
        assert re.match(r"\w+", found)[0] in call.names, f"{told}: {found}"
        return
    if any(x.is_meta for x in found if isinstance(x, torch.Tensor)):
        return
    if name not in NAN_IS_MEANT and all(map(is_tame, given.values())):
        assert not any(x.isnan().any() for x in found if isinstance(x, torch.Tensor)), f"{told}: NaN"
    if not call.backend:
        return
    expected = outcome(call, given | {"backend": "reference"})
    assert not isinstance(expected, str), f"{told}: the reference says {expected}"
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2, equal_nan=True, msg=lambda m: f"{told}: {m}")


@pytest.mark.parametrize("first", [0, *(pytest.param(at, marks=pytest.mark.slow) for at in range(300, 6000, 300))])
def test_the_value_of_the_reference_or_an_error_that_names_the_argument(first):
    for number in range(first, first + 300):
        check(number)
