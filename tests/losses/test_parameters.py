"""Parameters of losses: how they are saved, made on meta, and sharded over processes by FSDP."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from ccl_fast import losses
from tests.processes import run

pytestmark = pytest.mark.xdist_group("test_parameters")


def test_a_temperature_that_was_saved_as_a_scalar_is_read():
    loss_fn = losses.InfoNCELoss(0.5, learnable_temperature=True)
    saved = {"0.log_temperature": torch.tensor(0.25).log()}
    nn.Sequential(loss_fn).load_state_dict(saved)
    assert loss_fn.log_temperature.shape == (1,) and abs(loss_fn.temperature.item() - 0.25) < 1e-7
    with pytest.raises(RuntimeError, match="size mismatch for log_temperature"):
        loss_fn.load_state_dict({"log_temperature": torch.zeros(2)})


def test_a_module_made_on_meta_is_given_its_parameters_later():
    with torch.device("meta"):
        module = nn.ModuleList([losses.InfoNCELoss(0.07, learnable_temperature=True), losses.PairWeights(4)])
    assert "temperature=0.07" in repr(module)
    module.to_empty(device="cpu")
    for part in module.modules():
        if next(part.parameters(recurse=False), None) is not None:
            part.reset_parameters()
    assert abs(module[0].temperature.item() - 0.07) < 1e-8
    assert all(x.isfinite().all() for x in module.parameters())


def test_temperatures_of_centres_come_back_after_to_empty():
    given = torch.tensor([0.1, 0.2, 0.3])
    for options in ({}, {"learnable_temperature": True}):
        module = losses.CCLLoss(0.5, center_temperature=given, **options)
        module.to_empty(device="cpu")
        module.center_temperature.fill_(torch.nan)
        module.reset_parameters()
        assert module.center_temperature.equal(given) and module.center_temperature is not given
        assert abs(torch.as_tensor(module.temperature).item() - 0.5) < 1e-7
        module.center_temperature = torch.full((2,), 0.7)
        module.temperature = 0.4  # as a schedule does, which leaves the centres' alone
        assert module.center_temperature.tolist() == pytest.approx([0.7, 0.7])


def under_grad():
    """What torch.func.grad of a loss over several processes says."""
    with pytest.raises(ValueError, match=r"^process_group: expected None under torch\.func"):
        torch.func.grad(losses.InfoNCELoss(process_group="world"))(torch.randn(4, 2, 8))
    return True


def test_transforms_reach_no_other_process():
    assert all(run(under_grad, 2))


def make_model(**options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), losses.InfoNCELoss(0.3, learnable_temperature=True, **options))


def batch(step):
    return torch.randn(8, 2, 12, generator=torch.Generator().manual_seed(step))


def sharded(how):
    """Two steps of a model with a learnable temperature, whose parameters lie in parts on all processes."""
    rank, size, model = dist.get_rank(), dist.get_world_size(), make_model(process_group="world")
    if how == "FSDP2":
        fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    else:
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), []
    for step in range(2):
        loss = model(batch(step)[rank::size])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("how", ["FSDP2", pytest.param("FSDP1", marks=pytest.mark.slow)])
def test_parameters_may_be_sharded(how):
    model, expected = make_model(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        loss = model(batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    for found in run(sharded, 2, how):
        assert found == pytest.approx(expected, rel=1e-4)
