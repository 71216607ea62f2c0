"""Losses of small batches, with every kind of row: unassigned, alone, with one other of its id, with several."""

import torch

from ccl_fast import CCLLoss, InfoNCELoss, NTXentLoss, SupConLoss

N, D, K = 13, 6, 5


def rows(*shape, seed=0):
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


IDS = torch.tensor([0, 1, 1, -1, 2, 0, 0, 3, -1, 1, 4, 4, 2])
ALONE = torch.arange(N)
CENTERS, SCALES = rows(K, seed=1), torch.rand(K, generator=torch.Generator().manual_seed(2)) + 0.2
# What is built, and called with the leaves.
CASES = {
    "ccl": (CCLLoss, {}, lambda f, x: f(x, IDS, CENTERS.to(x.dtype)), 1),
    "ccl, weight": (CCLLoss, {"center_weight": 0.5}, lambda f, x: f(x, IDS, CENTERS.to(x.dtype)), 1),
    "ccl, temperature": (CCLLoss, {"center_temperature": 0.4}, lambda f, x: f(x, IDS, CENTERS.to(x.dtype)), 1),
    "ccl, temperatures": (CCLLoss, {"center_temperature": SCALES}, lambda f, x: f(x, IDS, CENTERS.to(x.dtype)), 1),
    "ccl, inside": (CCLLoss, {"form": "inside"}, lambda f, x: f(x, IDS, CENTERS.to(x.dtype)), 1),
    "supcon": (SupConLoss, {}, lambda f, x: f(x, IDS), 1),
    "supcon, inside": (SupConLoss, {"form": "inside"}, lambda f, x: f(x, IDS), 1),
    "supcon, no positives": (SupConLoss, {}, lambda f, x: f(x, ALONE), 1),
    "supcon, one class": (SupConLoss, {}, lambda f, x: f(x, 0 * ALONE), 1),
    "ccl, views": (CCLLoss, {}, lambda f, x, y: f(torch.stack((x, y), 1), IDS, CENTERS.to(x.dtype)), 2),
    "ccl, no ids": (CCLLoss, {}, lambda f, x, y: f(torch.stack((x, y), 1)), 2),
    "ccl, no ids, inside": (CCLLoss, {"form": "inside"}, lambda f, x, y: f(torch.stack((x, y), 1)), 2),
    "ccl, no ids, split": (CCLLoss, {"form": "split"}, lambda f, x, y: f(torch.stack((x, y), 1)), 2),
    "nt-xent": (NTXentLoss, {}, lambda f, x, y: f(x, y), 2),
    "infonce of views": (InfoNCELoss, {}, lambda f, x, y: f(torch.stack((x, y), 1)), 2),
    "towers": (InfoNCELoss, {}, lambda f, x, y: f(x, y), 2),
    "one tower": (InfoNCELoss, {"symmetric": False}, lambda f, x, y: f(x, y), 2),
}


def evaluate(case, dtype, backend, leaves=None, temperature=0.2, learn=True, **options):
    """The loss and the gradients of all that learns."""
    loss, own, call, count = CASES[case]
    module = loss(temperature, backend=backend, learnable_temperature=learn, **own, **options)
    if dtype == torch.float64:
        module.double()
    if leaves is None:
        leaves = [rows(N, seed=3 + i) for i in range(count)]
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in leaves]
    value = call(module, *leaves)
    grads = torch.autograd.grad(1.5 * value.sum(), [*leaves, *module.parameters()])
    return {"loss": value.detach()} | dict(zip((*"xy"[: len(leaves)], "temperature"), grads, strict=False))
