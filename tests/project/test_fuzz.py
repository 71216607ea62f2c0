"""Random arguments of the public API, wrong, odd and right: the reference's value, or an error that names one."""

import inspect
import random
import re

import numpy as np
import pytest
import torch

from ccl_fast import losses, ops

pytestmark = pytest.mark.usefixtures("one_thread")


def rows(n, *shape):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(n))


def ids(n):
    return torch.arange(n) % 3


def loss(cls, own=None, **forward):
    """A loss as one function of its options and of what its `forward` takes."""

    def call(**given):
        split = {name: given.pop(name) for name in forward if name in given}
        return cls(**given)(**split)

    call.names = [*inspect.signature(cls).parameters, *inspect.signature(cls.forward).parameters]
    call.backend = "backend" not in cls.unsupported
    return call, {"temperature": 0.2, "normalize": True, "reduction": "mean"} | (own or {}) | forward


def op(function, **given):
    def call(**given):
        return function(**given)

    call.names = list(inspect.signature(function).parameters)
    call.backend = "backend" in call.names
    return call, given


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
    "lightgcl": loss(losses.LightGCLLoss, {"positive_limit": 5.0}, **TWO, nodes=torch.arange(7)),
    "pamc": loss(losses.PamCLoss, **TWO, cluster_ids=ids(7)),
    "streaming_logsumexp": op(ops.streaming_logsumexp, q=rows(7, 5), k=rows(9, 5), scale=2.0, key_bias=rows(9),
                              q_ids=ids(7), k_ids=ids(9), candidates="all", return_same=False),
    "mutual_logsumexp": op(ops.mutual_logsumexp, q=rows(7, 5), k=rows(9, 5), scale=2.0, q_ids=ids(7), k_ids=ids(9)),
    "topk_logsumexp": op(ops.topk_logsumexp, q=rows(7, 5), k=rows(9, 5), scale=2.0, topk=2),
    "expected_similarity": op(ops.expected_similarity, q=rows(7, 5), k=rows(9, 5), scale=2.0, key_bias=rows(9)),
    "logsumexp_excluding": op(ops.logsumexp_excluding, q=rows(7, 5), k=rows(9, 5), excluded=ids(7)[:, None], scale=2.0),
    "streaming_topk": op(ops.streaming_topk, q=rows(7, 5), k=rows(9, 5), topk=2, candidates="all"),
    "similarity_histogram": op(ops.similarity_histogram, q=rows(7, 5), k=rows(9, 5), bins=4, range=(-1.0, 1.0)),
    "edge_similarity": op(ops.edge_similarity, q=rows(7, 5), k=rows(9, 5), crow_indices=torch.arange(8),
                          col_indices=torch.arange(7)),
    "same_id_similarity": op(ops.same_id_similarity, z=rows(7, 5), ids=ids(7)),
    "row_dot": op(ops.row_dot, a=rows(7, 5), b=rows(7, 5)),
    "sinkhorn": op(ops.sinkhorn, z=rows(7, 5), centers=rows(3, 5), scale=2.0, iterations=2),
    "swapped_prediction": op(ops.swapped_prediction, z=VIEWS.transpose(0, 1), centers=rows(3, 5),
                             potentials=rows(2, 3), scale=2.0, plan_scale=3.0),
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
    lambda x: x.clone().requires_grad_() if x.is_floating_point() else x, "below": lambda x: x - 10,
}  # fmt: skip


def mutated(value, chance):
    if isinstance(value, torch.Tensor) and chance.random() < 0.7:
        return OF_TENSORS[chance.choice(list(OF_TENSORS))](value)
    return chance.choice(ANYTHING)


def outcome(call, given):
    """Values, or the error's words."""
    try:
        with torch.random.fork_rng():
            found = call(**given)
    except (ValueError, IndexError) as error:
        return str(error)
    return found if isinstance(found, tuple) else (found,)


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
    if any(x.is_meta for x in found if isinstance(x, torch.Tensor)) or not call.backend:
        return
    expected = outcome(call, given | {"backend": "reference"})
    assert not isinstance(expected, str), f"{told}: the reference says {expected}"
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2, equal_nan=True, msg=lambda m: f"{told}: {m}")


@pytest.mark.parametrize("first", [0, *(pytest.param(at, marks=pytest.mark.slow) for at in range(300, 4200, 300))])
def test_the_value_of_the_reference_or_an_error_that_names_the_argument(first):
    for number in range(first, first + 300):
        check(number)
