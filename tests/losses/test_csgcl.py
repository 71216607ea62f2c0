"""CSGCLLoss against its definition, NT-Xent and the authors' figure; the strength of communities against networkx."""

import networkx
import pytest
import torch

from ccl_fast.losses import CSGCLLoss, NTXentLoss, community_strength
from tests.oracles.losses import assert_matches, batch, call, differentiate, learnable, reduced, unit
from tests.oracles.waves import other_waves, waves

pytestmark = pytest.mark.usefixtures("one_thread", "several_tiles")
STRENGTH = torch.tensor([0.1, -0.05, 0.2, 0.0, 0.03, 0.3, 0.1, -0.2, 0.5], dtype=torch.float64)


def csgcl(queries, keys, strength, *, temperature=0.4, strength_weight=1.0, normalize=True, reduction="mean"):
    z = torch.stack([unit(x.double()) if normalize else x.double() for x in (queries, keys)], 1)
    v, n = strength_weight * strength, len(z)
    losses = []
    for i in range(n):
        for view in (0, 1):
            logits = {(j, w): (z[i, view] @ z[j, w] + v[i] + v[j]) / temperature for j in range(n) for w in (0, 1)}
            own = logits.pop((i, view))
            assert own is not None
            losses.append(torch.stack([*logits.values()]).logsumexp(0) - logits[i, 1 - view])
    return reduced(losses, [True] * len(losses), (n, 2), reduction, queries)


def views(n=9, d=6, dtype=torch.float64):
    return batch(n, 2, d, 1, dtype=dtype)[0].unbind(1)


def check(q, k, *, temperature=0.4, tolerance=1e-10, **options):
    strength = STRENGTH[: len(q)]
    leaves = [x.clone().requires_grad_() for x in (q, k, strength)]
    backend = options.pop("backend", "auto")
    module = learnable(CSGCLLoss, temperature, backend=backend, **options)
    actual = differentiate(call(module, *leaves), [*leaves, *module.parameters()])
    exact = [x.double().clone().requires_grad_() for x in (q, k, strength)]
    log_temperature = torch.tensor(temperature, dtype=torch.float64).log().requires_grad_()
    expected = csgcl(*exact, temperature=log_temperature.exp(), **options)
    assert_matches(actual, differentiate(expected, [*exact, log_temperature], unused=True), tolerance)


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("n", (1, 2, 9))
def test_the_definition(n, reduction, backend):
    check(*views(n), reduction=reduction, backend=backend)


@pytest.mark.parametrize("temperature, normalize", ((0.05, True), (1.0, True), (0.5, False)))
@pytest.mark.parametrize("strength_weight", (0.0, 0.7))
def test_options(temperature, normalize, strength_weight, backend):
    options = {"temperature": temperature, "normalize": normalize, "strength_weight": strength_weight}
    check(*views(), backend=backend, **options)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.005)))
def test_dtypes(dtype, tolerance):
    check(*views(dtype=dtype), tolerance=tolerance)


def test_it_is_the_authors(backend):
    strength = torch.linspace(0.02, 0.2, 6, dtype=torch.float64)
    loss = CSGCLLoss(0.4, strength_weight=0.5, backend=backend)(waves(6, 4), other_waves(6, 4), strength=strength)
    torch.testing.assert_close(loss.item(), 2.547039, rtol=0, atol=5e-7)


def test_without_weight_it_is_grace():
    q, k = views()
    loss = CSGCLLoss(0.4, strength_weight=0)(q, k, strength=STRENGTH)
    torch.testing.assert_close(loss, NTXentLoss(0.4)(q, k))


def test_equal_strengths_make_no_difference():
    q, k = views()
    losses = [CSGCLLoss()(q, k, strength=torch.full((9,), v)) for v in (0.0, 0.3)]
    torch.testing.assert_close(*losses)


def test_an_empty_batch_is_zero_with_a_graph():
    z = torch.zeros(0, 6, requires_grad=True)
    loss = CSGCLLoss()(z, torch.zeros(0, 6), strength=torch.zeros(0))
    loss.backward()
    assert loss == 0


def test_errors():
    q, k = torch.ones(4, 3), torch.ones(4, 3)
    for strength, message in (
        (torch.ones(3), r"strength: expected shape \[4\], got \[3\]"),
        (torch.ones(4).long(), r"strength: expected float64.*int64"),
        ([1.0] * 4, r"strength: expected a torch.Tensor, got list"),
        (torch.ones(4, device="meta"), r"strength: expected device cpu.*meta"),
    ):
        with pytest.raises(ValueError, match=message):
            CSGCLLoss()(q, k, strength=strength)
    with pytest.raises(ValueError, match=r"strength_weight: expected a number >= 0, got -1"):
        CSGCLLoss(strength_weight=-1)


# ---- community_strength ----


def karate():
    graph = networkx.karate_club_graph()
    labels = torch.tensor([0 if graph.nodes[i]["club"] == "Mr. Hi" else 1 for i in range(len(graph))])
    return graph, torch.tensor([*graph.edges]).T, labels


@pytest.mark.parametrize("labels", ("clubs", "four", "one"))
def test_strengths_sum_to_the_modularity(labels):
    graph, edges, clubs = karate()
    labels = {"clubs": clubs, "four": torch.arange(34) % 4, "one": torch.zeros(34).long()}[labels]
    strength = community_strength(edges, labels)
    communities = [set((labels == c).nonzero().flatten().tolist()) for c in labels.unique()]
    of_communities = [strength[min(c)] for c in communities]
    expected = networkx.community.modularity(graph, communities, weight=None)
    torch.testing.assert_close(sum(of_communities).item(), expected, rtol=0, atol=1e-12)
    assert all((strength[list(c)] == v).all() for c, v in zip(communities, of_communities, strict=True))


def test_edges_in_both_directions_and_other_names_make_no_difference():
    _, edges, labels = karate()
    strength = community_strength(edges, labels)
    torch.testing.assert_close(community_strength(torch.cat((edges, edges.flip(0)), 1), labels), strength)
    torch.testing.assert_close(community_strength(edges.int(), 7 - 3 * labels), strength)


def test_nodes_without_a_community_are_alone():
    _, edges, labels = karate()
    alone = labels.clone()
    alone[[3, 8]] = -1
    numbered = alone.clone()
    numbered[[3, 8]] = torch.tensor([2, 3])
    torch.testing.assert_close(community_strength(edges, alone), community_strength(edges, numbered))


def test_no_edges_is_no_strength():
    assert (community_strength(torch.zeros(2, 0).long(), torch.arange(3)) == 0).all()


def test_errors_of_edges():
    labels = torch.tensor([0, 0, 1])
    for edges, error, message in (
        (torch.zeros(3, 2).long(), ValueError, r"edges: expected shape \[2, e\], got \[3, 2\]"),
        (torch.zeros(2, 2), ValueError, r"edges: expected integers, got torch.float32"),
        (torch.tensor([[0], [3]]), IndexError, r"edges: expected rows 0 to 2, got 0 to 3"),
    ):
        with pytest.raises(error, match=message):
            community_strength(edges, labels)
