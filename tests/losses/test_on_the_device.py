"""Every loss, and every operator over whole rows, on the device of the session: a GPU where there is one."""

import warnings

import pytest
import torch
from torch.utils._pytree import tree_map_only

from ccl_fast import ops
from tests.losses.test_contract import Bound, every_use, views
from tests.oracles.losses import assert_matches, evaluate
from tests.oracles.pairs import pairs

pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_a_gpu_warns_of_fails_no_test():
    """That autograd's thread, where its first work is a product, had no CUDA context yet; other warnings are errors."""
    warnings.warn("Attempting to run cuBLAS, but there was no current CUDA context! Attempting to set", stacklevel=1)
    with pytest.raises(UserWarning, match="another"):
        warnings.warn("another", stacklevel=1)


@every_use
@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 2e-3), (torch.bfloat16, 0.15)))
def test_losses(use, dtype, tolerance, kernel_device):
    def arguments(z):
        return tree_map_only(torch.Tensor, lambda x: x.to(kernel_device), use.arguments(z))

    z = views(dtype)
    module = Bound(use.module(learnable_temperature=True).loss_fn.to(kernel_device), arguments)
    actual = evaluate(module, z.to(kernel_device))
    assert all(x.device.type == kernel_device.type for x in actual)
    assert_matches([x.cpu() for x in actual], use.exact(z), tolerance)


def _edges(q, k):
    starts = torch.arange(len(q) + 1, device=q.device) * 2
    return ops.edge_similarity(q, k, starts, torch.arange(2 * len(q), device=q.device) % len(k))


OPERATORS = {
    "top-k": lambda q, k: ops.streaming_topk(q, k, topk=3)[0].flatten(),
    "top-k of many": lambda q, k: ops.streaming_topk(q, k, topk=50)[0].flatten(),
    "hardest": lambda q, k: ops.topk_logsumexp(q, k, scale=2.0, topk=5),
    "all but some": lambda q, k: ops.logsumexp_excluding(
        q, k, torch.arange(len(q), device=q.device)[:, None], scale=2.0
    ),
    "mean": lambda q, k: ops.expected_similarity(q, k, scale=2.0),
    "mean of others": lambda q, k: ops.expected_similarity(q, scale=2.0),
    "histogram": lambda q, k: ops.similarity_histogram(q, k, bins=7, range=(-4, 4)),
    "edges": _edges,
    "swapped prediction": lambda q, k: ops.swapped_prediction(
        torch.stack((q, q.flip(0))), k, torch.zeros(2, len(k), device=q.device), scale=1.0, plan_scale=2.0
    ),
    "distilled prediction": lambda q, k: ops.distilled_prediction(
        q, k, q.flip(0), k, scale=1.0, teacher_scale=2.0, hard=torch.arange(len(q), device=q.device) % 3 == 0
    ),
    "assignment mass": lambda q, k: ops.assignment_mass(q, k, scale=0.5),
    "largest by id": lambda q, k: ops.max_by_id(q, k, torch.arange(len(k), device=k.device) % 7).flatten(),
    "sinkhorn": lambda q, k: torch.cat(ops.sinkhorn(q, k, scale=0.5)),
}


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_operators_are_those_of_a_cpu_in_float64(operator, kernel_device):
    given = pairs(40, 900, dtype=torch.float32)

    def results(device, dtype):
        q, k = (x.to(device, dtype).requires_grad_() for x in (given.q, given.k))
        value = operator(q, k)
        grads = torch.autograd.grad(value.sum(), (q, k), materialize_grads=True) if value.requires_grad else ()
        return [x.detach().cpu() for x in (value, *grads)]

    expected = results("cpu", torch.float64)
    assert_matches(results(kernel_device, torch.float32), expected, 1e-4)
