"""OnlineClusters: a bank of features with labels and centres that follow."""

import pytest
import torch

from ccl_fast.clustering import OnlineClusters
from ccl_fast.losses import InterCLRLoss
from tests.oracles.losses import unit

pytestmark = pytest.mark.usefixtures("one_thread")


def blobs(n=60, k=4, d=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % k
    noise = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return (torch.eye(d, dtype=torch.float64)[labels] * 4 + noise).to(dtype), labels


def means(features, labels):
    return torch.stack([features[labels == c].mean(0) for c in range(int(labels.max()) + 1)])


def test_it_begins_with_the_means_of_a_clustering():
    features, labels = blobs()
    memory = OnlineClusters(features, labels.int(), min_size=1)
    torch.testing.assert_close(memory.features, unit(features))
    assert torch.equal(memory.labels, labels)
    torch.testing.assert_close(memory.centers, means(unit(features), labels))


@pytest.mark.parametrize("momentum", (1.0, 0.6))
def test_update(momentum):
    features, labels = blobs()
    memory = OnlineClusters(features, labels, momentum=momentum, min_size=1)
    indices, new = torch.tensor([7, 3, 50]), 100 * blobs(seed=1)[0][[0, 3, 5]]
    centers, expected = memory.centers.clone(), unit(features)
    expected[indices] = unit((1 - momentum) * expected[indices] + momentum * unit(new))
    changed = memory.update(indices, new)
    torch.testing.assert_close(memory.features, expected)
    nearest = (expected[indices] @ unit(centers).T).argmax(1)
    assert torch.equal(memory.labels[indices], nearest) and (nearest != labels[indices]).any()
    torch.testing.assert_close(changed, (nearest != labels[indices]).double().mean())
    others = torch.ones(60, dtype=torch.bool).index_fill(0, indices, False)
    assert torch.equal(memory.labels[others], labels[others]) and torch.equal(memory.centers, centers)
    memory.update_centers()
    torch.testing.assert_close(memory.centers, means(expected, memory.labels))


def test_small_clusters_are_dissolved_and_large_ones_halved():
    features, labels = blobs(90, 3)
    features[:30:3] += 20 * torch.eye(6, dtype=torch.float64)[4]  # 10 rows of cluster 0 are blobs of their own
    labels += 1
    labels[1] = 0  # a cluster of one row of blob 2
    memory = OnlineClusters(features, labels, min_size=5)
    assert memory.labels[1] == 2 and memory.labels.bincount(minlength=4).min() >= 5
    apart = torch.zeros(90, dtype=torch.bool)
    apart[:30:3] = True
    assert torch.equal(memory.labels[::3] == memory.labels[0], apart[::3])  # by k-means, not any half
    torch.testing.assert_close(memory.centers, means(unit(features), memory.labels))


def test_no_cluster_is_empty_even_of_equal_rows():
    memory = OnlineClusters(torch.ones(8, 3), torch.tensor([0, 0, 0, 0, 0, 0, 0, 3]), min_size=2)
    assert memory.labels.bincount(minlength=4).min() >= 1
    few = OnlineClusters(torch.eye(3), torch.arange(3))  # all are small: nothing to dissolve them into
    assert torch.equal(few.labels, torch.arange(3))
    more = OnlineClusters(torch.eye(3), torch.tensor([0, 1, 5]), min_size=1)  # than rows
    assert torch.equal(more.labels, torch.tensor([0, 1, 5])) and more.centers.isfinite().all()


def test_state_and_device_are_those_of_a_module():
    memory, other = (OnlineClusters(*blobs(seed=seed)) for seed in (0, 1))
    other.load_state_dict(memory.state_dict())
    assert torch.equal(other.features, memory.features) and not list(memory.parameters())
    assert OnlineClusters(*blobs(dtype=torch.bfloat16)).centers.dtype == torch.float32


def test_interclr_with_online_labels():
    features, labels = blobs(dtype=torch.float32)
    memory = OnlineClusters(features, labels, min_size=5)
    z, loss_fn = torch.nn.Parameter(features.clone()), InterCLRLoss(inter_weight=1, num_negatives=20, pool=0.5)
    optimiser, generator = torch.optim.SGD([z], lr=5.0), torch.Generator().manual_seed(0)
    losses = []
    for step in range(30):
        indices = torch.randperm(60, generator=generator)[:20]
        loss = loss_fn(
            z[indices],
            z[indices].detach(),
            negatives=features,
            bank=memory.features,
            bank_cluster_ids=memory.labels,
            indices=indices,
            generator=generator,
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        memory.update(indices, z[indices])
        if step % 10 == 9:
            memory.update_centers()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert memory.labels.bincount(minlength=4).min() >= 5


def test_errors():
    features, labels = blobs()
    for arguments, options, message in (
        ((features, labels[:4]), {}, r"labels: expected shape \[60\], got \[4\]"),
        ((features, labels - 1), {}, "labels: expected at least one, and none below 0"),
        ((features[:0], labels[:0]), {}, "labels: expected at least one, and none below 0"),
        ((features, labels), {"momentum": 0}, "momentum: expected a number above 0 and at most 1, got 0"),
        ((features, labels), {"min_size": 0}, "min_size: expected a positive integer, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            OnlineClusters(*arguments, **options)
    memory = OnlineClusters(features, labels)
    with pytest.raises(ValueError, match=r"indices: expected shape \[2\], got \[3\]"):
        memory.update(torch.arange(3), features[:2])
    with pytest.raises(ValueError, match=r"embeddings: expected shape \[rows, 6\], got \[2, 3\]"):
        memory.update(torch.arange(2), features[:2, :3])


def test_no_cluster_stays_empty_where_all_are_small():
    features = torch.randn(30, 8, generator=torch.Generator().manual_seed(0)).abs()
    clusters = OnlineClusters(features, torch.arange(30) % 2 * 2)  # nobody has label 1
    assert (clusters.labels.bincount(minlength=3) > 0).all() and clusters.centers.norm(dim=1).min() > 0.1
