# ruff: noqa: E402 (the extra must be there)
"""What clustering hands to contrast, and random numbers that depend on a name alone."""

import pytest
import torch
from torch.nn import functional as F

for extra in ("torchmetrics", "lightning", "kornia", "tensorboard", "jsonargparse", "mlxtend"):
    pytest.importorskip(extra)  # the extra "train"

from ccl_fast.errors import ArgumentError
from ccl_fast.metrics import cluster_quality
from ccl_fast.training.pseudo_labels import PseudoLabels, agreement
from ccl_fast.training.randomness import seeded, shuffled

CPU = torch.device("cpu")


def blobs(k, each, spread, seed=0):
    """k directions with rows around them: embeddings [k each, 8] and which direction [k each]."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q[:k]
    classes = torch.arange(k).repeat_interleave(each)
    spread = torch.as_tensor(spread).expand(k)[classes, None]
    return directions[classes] + spread * torch.randn(k * each, 8, generator=generator), classes


def make(clusters, concentration=False, **given):
    return PseudoLabels(clusters, seed=0, temperature=0.2, concentration=concentration, device=CPU, **given)


def test_a_clustering_of_the_images_asked_for_is_there_for_every_number_of_clusters():
    x, classes = blobs(4, 20, 0.05)
    labels, rows = make([4, 2]), torch.tensor([0, 3, 25, 70, 41])
    assert labels.of(rows) == []
    labels.update(x, classes)
    for k, (ids, centers, temperatures, *_) in zip([4, 2], labels.of(rows), strict=True):
        assert centers.shape == (k, 8)
        assert (F.normalize(x[rows]) @ centers.T).argmax(1).equal(ids)
        assert temperatures is None


def test_tight_clusters_get_a_lower_temperature():
    x, _ = blobs(3, 40, [0.01, 0.05, 0.3])
    labels = make([3], concentration=True)
    labels.update(x, None)
    ((ids, _, temperatures, *_),) = labels.of(torch.tensor([0, 40, 80]))
    of_class = temperatures[ids]
    assert of_class[0] < of_class[1] < of_class[2]
    assert temperatures.mean().item() == pytest.approx(0.2)


def test_the_log_counts_sizes_changes_and_agreement():
    x, classes = blobs(4, 20, 0.02)
    labels = make([4])
    first = labels.update(x, classes)
    assert first == {
        "smallest_cluster": 20,
        "largest_cluster": 20,
        "nmi": pytest.approx(1),
        "accuracy": 1,
        "purity": 1,
        "same_class": 1,
    }
    assert labels.update(x, None) == {"smallest_cluster": 20, "largest_cluster": 20, "changed_labels": 0}
    moved = x.clone()
    moved[0] = x[20]  # one row goes to another cluster
    again = labels.update(moved, classes)
    assert again["changed_labels"] == pytest.approx(1 / 80)
    assert again["accuracy"] == pytest.approx(79 / 80)
    both = make([4, 2])
    assert {"smallest_cluster/4", "smallest_cluster/2"} == both.update(x, None).keys() & {
        "smallest_cluster/4",
        "smallest_cluster/2",
        "smallest_cluster",
    }


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_those_nearest_to_their_centers_are_believed(share):
    x, classes = blobs(4, 20, 0.2)
    labels, rows = make([4], believe=share), torch.arange(80)
    log = labels.update(x, classes)
    ((ids, centers, *_),) = labels.of(rows)
    nearest, to_centers = (F.normalize(x) @ centers.T).max(1).indices, (F.normalize(x) @ centers.T).amax(1)
    believed = ids >= 0
    assert believed.sum() == round(share * 80)
    assert ids[believed].equal(nearest[believed])
    if 0 < share < 1:
        assert to_centers[believed].min() >= to_centers[~believed].max() - 1e-6
        assert log["believed"] == share
        assert log["believed_same_class"] >= log["same_class"]
    assert labels.update(x, None)["changed_labels"] == 0  # of all images, believed or not


def test_as_many_are_believed_as_agree():
    x, _ = blobs(4, 250, 0.3)
    rows = torch.arange(0, 1000, 2)
    for spread, least, most in [(0.0, 0.99, 1.0), (0.5, 0.1, 0.9), (100.0, 0.0, 0.1)]:
        noise = torch.randn(2, 500, 8, generator=torch.Generator().manual_seed(1))
        views = [x[rows] + spread * each for each in noise]
        labels, asked = make([4, 3], believe="agreement"), []
        log = labels.update(x, None, lambda views=views, asked=asked: asked.append(0) or (rows, views))
        assert asked == [0]  # once for all numbers of clusters
        assert least <= log["believed/4"] <= most
        found = labels.found[0]
        expected = agreement(found["all_ids"][rows], views, found["centers"])
        assert (found["ids"] >= 0).sum() == round(expected * 1000)
        assert labels.of(rows)[0].believed == log["believed/4"]


def test_agreement_is_of_ids_and_all_views_and_beyond_chance():
    centers, ids = torch.eye(4), torch.arange(4).repeat(5)
    views = torch.eye(4).repeat(5, 1)
    assert agreement(ids, [views, views], centers) == 1
    assert agreement(ids, [views, views.roll(1, 0)], centers) == 0
    assert agreement(ids.roll(1), [views, views], centers) == 0
    half = torch.cat([views[:10], views[10:].roll(1, 0)])
    assert agreement(ids, [half], centers) == pytest.approx((0.5 - 0.25) / 0.75, abs=0.02)
    assert agreement(ids, [half, views], centers) == agreement(ids, [views, half], centers)
    assert agreement(ids, [half, views], centers) == pytest.approx((0.5 - 0.125) / 0.875, abs=0.02)
    assert agreement(torch.zeros(3, dtype=torch.int64), [views[:1].expand(3, 4)], centers) == 1  # one cluster has all
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 4, generator=generator)
    # Views that agree with each other, not with the ids: any partition of the features is stable.
    assert agreement(torch.randint(4, (4000,), generator=generator), [x, x], centers) < 0.05


@pytest.mark.parametrize("labels_from", ["classes", "random"])
def test_other_labels_than_those_of_k_means(labels_from):
    x, classes = blobs(4, 20, 0.05)
    labels = make([4], labels_from=labels_from)
    for _ in range(2):
        labels.update(x, classes + 3)
        ((ids, centers, *_),) = labels.of(torch.arange(80))
        assert (ids.unique() == torch.arange(4)).all()
        for k in range(4):
            assert centers[k].allclose(F.normalize(F.normalize(x[ids == k]).sum(0), dim=0), atol=1e-5)
    assert ids.equal(classes) == (labels_from == "classes")


def test_labels_from_classes_need_classes():
    x, _ = blobs(4, 20, 0.05)
    with pytest.raises(ArgumentError, match=r"^labels_from: expected images with classes"):
        make([4], labels_from="classes").update(x, None)


def test_the_state_comes_back():
    x, _ = blobs(3, 10, 0.1)
    labels, other = make([3, 2], True), make([3, 2], True)
    labels.update(x, None)
    other.load_state_dict(labels.state_dict())
    assert labels.update(x * 0.5, None) == other.update(x * 0.5, None)
    for ours, theirs in zip(labels.found, other.found, strict=True):
        assert ours.pop("believed") == theirs.pop("believed")
        assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_cluster_quality_against_scikit_learn_and_by_hand():
    from sklearn import metrics

    generator = torch.Generator().manual_seed(0)
    for k, n_classes in [(3, 5), (7, 4), (1, 2), (10, 10)]:
        ids, classes = (torch.randint(m, (200,), generator=generator) for m in (k, n_classes))
        found = cluster_quality(ids, classes)
        assert found["nmi"] == pytest.approx(metrics.normalized_mutual_info_score(classes, ids), abs=1e-5)
        assert found["purity"] == metrics.cluster.contingency_matrix(classes, ids).max(0).sum() / 200
        mates = (ids[:, None] == ids) & ~torch.eye(200, dtype=torch.bool)
        same = (mates & (classes[:, None] == classes)).sum(1) / mates.sum(1)
        assert found["same_class"] == pytest.approx(same[mates.any(1)].mean().item())
    same = cluster_quality(torch.tensor([0, 0, 1, 1]), torch.tensor([-1, -1, 10**12, 10**12]))
    assert same["accuracy"] == 1 and same["nmi"] == pytest.approx(1)
    # Two clusters of class 0: only one of them may stand for it.
    found = cluster_quality(torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 0, 0, 1, 1]))
    assert found["accuracy"] == pytest.approx(4 / 5)
    assert found["purity"] == 1
    assert found["same_class"] == 1
    found = cluster_quality(torch.tensor([0, 0, 0, 1]), torch.tensor([5, 5, 6, 6]))
    assert found["same_class"] == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    assert found["purity"] == pytest.approx(3 / 4)
    assert cluster_quality(torch.arange(3), torch.zeros(3))["same_class"] == 1  # nobody has mates


def test_random_numbers_depend_on_their_keys_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    draws = []
    for keys in [(0, 1, 2), (0, 1, 2), (0, 1, 3), (0, 2, 1), (1, 1, 2)]:
        with seeded(CPU, *keys):
            draws.append(torch.rand(3))
        torch.rand(1)
        torch.set_rng_state(before)
    assert draws[0].equal(draws[1])
    assert len(torch.stack(draws).unique(dim=0)) == 4
    assert shuffled(50, 0, 1).equal(shuffled(50, 0, 1))
    assert not shuffled(50, 0, 1).equal(shuffled(50, 0, 2))
    assert shuffled(50, 0, 1).sort().values.equal(torch.arange(50))
    assert torch.get_rng_state().equal(before)
