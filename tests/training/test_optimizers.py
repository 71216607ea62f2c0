# ruff: noqa: E402 (the extra must be there)
"""Optimisers and learning rate: what a step does to weights and prototypes, and that nothing is lost of momentum."""

import functools

import pytest
import torch
from torch.testing import assert_close

for extra in ("mlxtend", "jsonargparse", "docstring_parser", "torchmetrics", "lightning", "kornia", "timm"):
    pytest.importorskip(extra)  # the extra "train"

from timm.scheduler import CosineLRScheduler

from ccl_fast.commands import train
from ccl_fast.errors import ArgumentError
from ccl_fast.training.config import Config
from tests.training.test_loop import make_images, make_run
from tests.training.test_warm_up import TINY, assert_same_end

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
MOMENTUM = 0.8
GIVEN = {"learning_rate": 0.05, "weight_decay": 0.1, "epochs": 3}


def named(run):
    return dict(run.model.named_parameters()) | {f"prototypes.{i}": p for i, p in enumerate(run.prototypes)}


def weights_of_steps(run, epochs):
    """Before every step and at the end: rate, weights and gradients, in float64; before prototypes are rescaled."""
    steps = []

    def keep(optimizer, *_):
        of_step = {name: (p.detach().double(), p.grad.double()) for name, p in named(run).items() if p.grad is not None}
        steps.append((optimizer.param_groups[0]["lr"], of_step))

    run.optimizer.register_step_pre_hook(keep)
    run.optimizer.register_step_post_hook(
        lambda *_: steps.append({name: p.detach().double() for name, p in named(run).items()})
    )
    run.advance(epochs)
    return list(zip(steps[::2], steps[1::2], strict=True))


def step_of(optimizer, decay, weights, gradient, buffer):
    """The optimiser's definition: what momentum becomes."""
    direction = gradient + decay * weights
    if optimizer == "lars":
        direction *= 0.001 * weights.norm() / (gradient.norm() + decay * weights.norm())
    return direction if buffer is None else MOMENTUM * buffer + direction


@pytest.mark.parametrize("decay", [0.1, 0.0])  # where timm's own LARS would be plain SGD
@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_a_step_is_what_the_paper_says(optimizer, exclude, decay):
    given = GIVEN | {"optimizer": optimizer, "momentum": MOMENTUM, "exclude_bias_and_norm": exclude}
    given |= {"weight_decay": decay}
    run = make_run(make_images(16), objective="swav", **given)
    buffers, moved = {}, set()
    for (rate, before), after in weights_of_steps(run, 3):
        for name, (weights, gradient) in before.items():
            left_out = exclude and weights.ndim <= 1
            definition = "sgd" if left_out else optimizer
            if definition == "lars" and not (weights.norm() and gradient.norm()):  # a bias that begins with 0
                definition = "sgd"
            buffers[name] = step_of(definition, 0 if left_out else decay, weights, gradient, buffers.get(name))
            assert_close(after[name], weights - rate * buffers[name], rtol=1e-5, atol=1e-6)
            moved |= {name} if not after[name].equal(weights) else set()
    assert moved == named(run).keys()


def test_adamw_decays_all_but_what_is_excluded():
    def end(**given):
        torch.manual_seed(0)  # of the encoder
        run = make_run(make_images(8), objective="simclr", **GIVEN | {"epochs": 1} | given)
        run.advance(1)
        return named(run)

    excluded, whole, without = end(exclude_bias_and_norm=True), end(), end(weight_decay=0.0)
    for name, weights in excluded.items():
        assert weights.equal((whole if weights.ndim > 1 else without)[name]), name
        if name == "encoder.2.weight":  # a norm's, which begins with 1
            assert not weights.equal(whole[name])


@pytest.mark.parametrize("rise", [0, 1, 3])
def test_the_learning_rate_is_that_of_timms_scheduler(rise):
    run, rates = make_run(make_images(16), epochs=4, objective="simclr", learning_rate=0.02, lr_warmup_epochs=rise), []
    run.optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    run.advance(4)
    (group,) = (optimizer := torch.optim.SGD([torch.zeros(1)], lr=0.02)).param_groups
    scheduler = CosineLRScheduler(
        optimizer, 8 - 2 * rise, warmup_t=2 * rise, warmup_lr_init=0, warmup_prefix=True, t_in_epochs=False
    )
    expected = []
    for step in range(8):
        scheduler.step_update(step)
        expected.append(group["lr"])
    assert rates == pytest.approx(expected)
    assert max(rates) == 0.02 and (rates[0] == 0) == bool(rise)


@pytest.mark.parametrize("optimizer", [slow("adamw"), "sgd", "lars"])
def test_it_goes_on_from_every_step_as_if_nothing_had_been(optimizer):
    plan = GIVEN | {"optimizer": optimizer, "objective": "swav", "warmup_epochs": 1, "lr_warmup_epochs": 2}
    plan |= {"exclude_bias_and_norm": True}
    run, states = make_run(make_images(16), **plan), []
    run.advance(1, after_step=lambda: states.append(run.state_dict()))
    run.advance(3, after_step=lambda: states.append(run.state_dict()))
    assert len(states) == 6
    end = run.state_dict()
    for state in states:
        again = make_run(make_images(16), **plan)
        again.load_state_dict(state)
        again.advance(3)
        assert_close(again.state_dict(), end, rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", ["lars", slow("sgd")])
@pytest.mark.slow
def test_a_continuation_has_the_momentum_of_the_warm_up(optimizer, tmp_path, no_page, one_thread):
    given = TINY | {"optimizer": optimizer, "lr_warmup_epochs": 1, "learning_rate": 0.1, "exclude_bias_and_norm": True}
    train(tmp_path / "origin", **given | {"objective": "simclr"})
    given |= {"objective": "swav", "baseline": False}
    train(tmp_path / "whole", **given)
    train(tmp_path / "run", **given, warmup_from=tmp_path / "origin")
    assert_same_end(tmp_path / "run", tmp_path / "whole", ["swav"])
    with pytest.raises(ArgumentError, match=r"^optimizer: expected .*, as the run to warm up from has it"):
        train(tmp_path / "other", **given | {"optimizer": "adamw"}, warmup_from=tmp_path / "origin")


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"optimizer": "adam"}, r"^optimizer: expected .*, got 'adam'"),
        ({"momentum": 0.5}, r"^momentum: expected 0.9 with optimizer 'adamw', got 0.5"),
        ({"optimizer": "sgd", "momentum": 1.0}, r"^momentum: expected 0 to less than 1, got 1.0"),
        ({"optimizer": "lars", "fused_optimizer": True}, r"^fused_optimizer: expected False with optimizer 'lars'"),
        ({"lr_warmup_epochs": 3, "epochs": 3}, r"^lr_warmup_epochs: expected fewer than epochs=3, got 3"),
        ({"lr_warmup_epochs": -1}, r"^lr_warmup_epochs: expected"),
        ({"exclude_bias_and_norm": 1}, r"^exclude_bias_and_norm: expected"),
    ],
)
def test_what_does_not_go_together_is_named(given, error):
    with pytest.raises(ArgumentError, match=error):
        Config(**given).check()
