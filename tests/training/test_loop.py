# ruff: noqa: E402 (the extra must be there)
"""The schedule step by step: what reaches network, loss, k-means, optimiser and detectors, and when."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.testing import assert_close
from torch.utils.data import TensorDataset

for extra in ("mlxtend", "jsonargparse", "docstring_parser", "torchmetrics", "lightning", "kornia", "tensorboard"):
    pytest.importorskip(extra)  # the extra "train"

from lightning.fabric import Fabric
from safetensors.torch import load_file

from ccl_fast.clustering import KMeans
from ccl_fast.commands import train
from ccl_fast.data.images import InMemory
from ccl_fast.evaluation import evaluate_model
from ccl_fast.evaluation.detection import DEFAULT, STARTS
from ccl_fast.models import Model
from ccl_fast.ood import (
    Columns,
    CosineNorm,
    Ensemble,
    Mahalanobis,
    NearestCenter,
    NearestNeighbor,
    PrototypeScore,
    ood_metrics,
)
from ccl_fast.training.config import Config
from ccl_fast.training.loop import Run

SHAPE = (1, 8, 8)


class Encoder(nn.Sequential):
    """Dropout and BatchNorm tell training from evaluation; ``seen`` counts the images of training."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, images):
        if self.training:
            self.seen += len(images)
        return super().forward(images)


def make_images(n, seed=0):
    """Noise; the first pixel of image i has the value i."""
    pixels = torch.randint(256, (n, *SHAPE), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    pixels[:, 0, 0, 0] = torch.arange(n)
    return InMemory(pixels)


def make_run(images, **given):
    """Steps of 8 images."""
    small = {"backbone": Encoder(), "embedding_dim": 6, "batch_size": 8, "clusters": [3], "warmup_epochs": 0}
    return Run(Config(**small | given), images, Fabric(accelerator="cpu", devices=1))


def views_of_steps(run, epochs):
    """What the network was given in every step, [images, 2 views, c, h, w]."""
    views = []
    hook = run.model.encoder.register_forward_pre_hook(lambda _, given: views.append(given[0].unflatten(0, (-1, 2))))
    run.advance(epochs)
    hook.remove()
    return views


def moving_average(states, decay):
    """The exponential moving average of state_dicts, from the first one on; whole numbers are the last one's."""
    average = dict(states[0])
    for state in states[1:]:
        for name, value in state.items():
            average[name] = decay * average[name] + (1 - decay) * value if value.is_floating_point() else value
    return average


@pytest.fixture
def fits(monkeypatch):
    """What each k-means began with, was given and found, as they come."""
    fits, fit = [], KMeans.fit

    def spy(self, x, *weights, **options):
        fit(self, x, *weights, **options)
        fits.append(SimpleNamespace(init=self.init, x=x.clone(), centers=self.cluster_centers_.clone()))
        return self

    monkeypatch.setattr(KMeans, "fit", spy)
    return fits


def test_every_epoch_has_an_order_of_its_own():
    views = views_of_steps(make_run(make_images(20), objective="simclr", augmentation="none"), epochs=3)
    assert [len(of_step) for of_step in views] == [8] * 6
    assert all(of_step[:, 0].equal(of_step[:, 1]) for of_step in views)
    rows = [(of_step[:, 0, 0, 0, 0] * 255).round().int().tolist() for of_step in views]
    orders = [rows[i] + rows[i + 1] for i in (0, 2, 4)]
    assert all(len(set(order)) == 16 for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert len({frozenset(order) for order in orders}) > 1  # nor are the same images left out


def test_no_view_comes_twice():
    one_image = InMemory(make_images(1).pixels.expand(16, -1, -1, -1).clone())
    views = torch.cat(views_of_steps(make_run(one_image, objective="simclr", augmentation="digits"), epochs=2)).flatten(
        0, 1
    )
    assert len(views) == 64
    assert len(views.unique(dim=0)) == 64


def test_the_loss_gets_the_cluster_ids_of_its_images():
    class Spy(nn.Module):
        def forward(self, z, of):
            calls.append((z.detach(), of.ids, of.centers))
            return z.square().mean()

    calls, images = [], make_images(40)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 16))
    still = {"augmentation": "none", "learning_rate": 0.0, "recluster_every": 2, "believe": 1}
    run = make_run(images, backbone=backbone, clusters=[7, 5], **still)
    run.loss_fn = Spy()
    run.advance(2)
    assert len(calls) == 2 * 5 * 2
    with torch.no_grad():
        embeddings = run.model(images.pixels / 255)
    for i, (z, ids, centers) in enumerate(calls):
        assert z[:, 0].equal(z[:, 1])
        distances, rows = (z[:, 0, None] - embeddings).norm(dim=2).min(1)
        assert distances.max() < 1e-5
        found = run.pseudo_labels.found[i % 2]
        assert len(centers) == (7, 5)[i % 2]
        assert ids.equal(found["ids"][rows])
        assert ids.equal((embeddings[rows] @ found["centers"].T).argmax(1))


def test_the_learning_rate_is_half_a_cosine_over_the_whole_run():
    run, rates = make_run(make_images(16), epochs=4, warmup_epochs=1, learning_rate=0.02), []
    run.optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    run.advance(4)
    assert len(rates) == 8
    assert rates[::2] == pytest.approx([0.02, 0.0170710678, 0.01, 0.0029289322])
    assert [first + last for first, last in zip(rates[1:], rates[:0:-1], strict=True)] == pytest.approx([0.02] * 7)
    assert rates == sorted(rates, reverse=True)
    assert run.learning_rate == pytest.approx(0, abs=1e-12)


def test_clusterings_are_counted_from_the_end_of_the_warm_up(monkeypatch):
    plan = {"epochs": 6, "warmup_epochs": 1, "recluster_every": 2}
    run, epochs, states, fit = make_run(make_images(16), **plan), [], [], KMeans.fit
    monkeypatch.setattr(
        KMeans, "fit", lambda *given, **options: (epochs.append(run.step / 2), fit(*given, **options))[1]
    )

    def keep():
        states.append((run.step, run.state_dict()))

    run.advance(1, after_epoch=keep)
    run.advance(6, after_step=keep, after_epoch=keep)
    assert epochs == [1, 3, 5]
    assert [step for step, _ in states] == [2, 3, 4, 4, 5, 6, 6, 7, 8, 8, 9, 10, 10, 11, 12, 12]
    for step, state in states:
        epochs.clear()
        run = make_run(make_images(16), **plan)
        run.load_state_dict(state)
        run.advance(6)
        assert epochs == [epoch for epoch in (1, 3, 5) if 2 * epoch >= step]


def test_images_that_views_do_not_agree_on_are_not_believed():
    run = make_run(make_images(40), backbone=nn.Sequential(nn.Flatten(), nn.Linear(64, 16)), clusters=[5], epochs=1)
    run.advance(1)
    assert run.log["believed"] == (run.pseudo_labels.found[0]["ids"] >= 0).double().mean().item() < 1
    same = make_run(make_images(40), clusters=[5], epochs=1, augmentation="none")
    same.advance(1)
    assert same.log["believed"] == 1


def test_the_loss_gets_its_instance_weight():
    run = make_run(make_images(16), epochs=1, instance_weight=0.3)
    assert run.loss_fn.instance_weight == 0.3
    assert not make_run(make_images(16), epochs=1, objective="supcon").loss_fn.instance_weight


def test_kmeans_starts_from_the_last_centers_also_when_resumed(fits):
    run = make_run(make_images(16), epochs=4, clusters=[3, 2])
    run.advance(3)
    again = make_run(make_images(16), epochs=4, clusters=[3, 2])
    again.load_state_dict(run.state_dict())
    again.advance(4)
    assert [fit.init for fit in fits[:2]] == ["k-means++"] * 2
    assert [len(fit.centers) for fit in fits] == [3, 2] * 4
    for last, fit in zip(fits, fits[2:], strict=False):
        assert isinstance(fit.init, torch.Tensor)
        assert fit.init.equal(last.centers)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_kmeans_gets_images_as_they_are_through_the_average_in_evaluation_mode(ema, fits):
    images = make_images(24)
    run = make_run(images, epochs=3, augmentation="digits", learning_rate=0.05, ema=ema)
    model, states = copy.deepcopy(run.model), [copy.deepcopy(run.model.state_dict())]
    run.advance(3, after_step=lambda: states.append(copy.deepcopy(run.model.state_dict())))
    assert len(states) == 10
    assert len(fits) == 3
    for fit, steps in zip(fits, (0, 3, 6), strict=True):
        model.load_state_dict(moving_average(states[1 : steps + 1], ema) if ema and steps else states[steps])
        with torch.no_grad():
            assert_close(fit.x, model.eval()(images.pixels / 255), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ema", [None, 0.9, 0.9999])
def test_the_result_is_the_average_of_the_weights_and_counts_as_the_model_does(ema):
    run, states = make_run(make_images(16), epochs=2, learning_rate=0.05, ema=ema), []
    run.advance(2, after_step=lambda: states.append(copy.deepcopy(run.model.state_dict())))
    assert len(states) == 4
    result, expected = run.result.state_dict(), moving_average(states, ema) if ema else states[-1]
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(result[name], value, msg=lambda text, name=name: f"{name}: {text}")
    assert result["encoder.seen"] == 64
    assert result["encoder.2.num_batches_tracked"] == 4


def test_the_average_is_what_is_evaluated_and_saved(tmp_path, monkeypatch):
    evaluated, steps = {}, []
    monkeypatch.setattr(
        "ccl_fast.commands.report.write_page", lambda path, report, evaluations, _: evaluated.update(evaluations) or []
    )
    train_set, test_set, other = (make_images(n, seed).pixels / 255 for seed, n in enumerate((16, 6, 5)))
    hook = register_optimizer_step_post_hook(
        lambda optimizer, *_: steps.append([p.detach().clone() for p in optimizer.param_groups[0]["params"]])
    )
    try:
        train(
            tmp_path / "run",
            data=(TensorDataset(train_set), TensorDataset(test_set)),
            near_ood={"other": TensorDataset(other)},
            far_ood=[],
            baseline=False,
            backbone=Encoder(),
            **{"epochs": 2, "warmup_epochs": 1, "batch_size": 8, "clusters": 2, "learning_rate": 0.05, "ema": 0.8},
        )
    finally:
        hook.remove()
    assert len(steps) == 4
    model = Model(Encoder(), SHAPE)
    model.load_state_dict(load_file(tmp_path / "run" / "ccl.safetensors"))
    expected = moving_average([dict(enumerate(step)) for step in steps], 0.8)
    for i, saved in enumerate(model.parameters()):
        assert_close(saved.detach(), expected[i])
    for part, images in {"train": train_set, "test": test_set, "other": other}.items():
        with torch.no_grad():
            assert_close(evaluated["ccl"].features[part]["head"], model.eval()(images))


def test_every_figure_is_of_a_detector_fitted_to_training_features_of_its_level():
    encoder = nn.Sequential(
        nn.Conv2d(1, 5, 3), nn.Sequential(nn.BatchNorm2d(5), nn.ReLU()), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    model = Model(encoder, SHAPE, dim=6)
    parts = {name: make_images(n, n) for name, n in {"train": 60, "test": 31, "a": 32, "b": 33, "c": 34}.items()}
    near, far = ({name: parts[name] for name in names} for names in ("ab", "c"))
    evaluation = evaluate_model(model, parts["train"], parts["test"], near, far, clusters=3, seed=1)
    model.eval()
    features = {}
    for name, images in parts.items():
        with torch.no_grad():
            first = model.encoder[0](images.pixels / 255)
            maps = first, model.encoder[1](first)
            encoded = model.encoder(images.pixels / 255)
            assert_close(evaluation.features[name], {"encoder": encoded, "head": model.head(encoded)})
        statistics = [of for x in maps for of in (x.mean((2, 3)), x.std((2, 3), correction=0))]
        features[name] = evaluation.features[name] | {"all": torch.cat([model.head(encoded), encoded, *statistics], 1)}
    of_level = {
        "nearest_neighbor": NearestNeighbor(),
        "nearest_center": NearestCenter(n_clusters=3),
        "energy": PrototypeScore("energy", n_clusters=3),
        "mahalanobis": Mahalanobis(n_clusters=3),
        "cosine_norm": CosineNorm(),
        "ensemble": Ensemble([NearestNeighbor(), Mahalanobis(n_clusters=3)], seed=1),
    }
    detectors = {f"{level}/{name}": of for level in ("encoder", "head") for name, of in copy.deepcopy(of_level).items()}
    width = features["train"]["head"].shape[1]
    seen = [
        Columns(of, columns)
        for columns in (slice(width), slice(width, width + 5))
        for of in (NearestNeighbor(), Mahalanobis(n_clusters=3))
    ]
    for start in (width + 5, width + 15):
        of_maps = Mahalanobis(shrinkage=0.01, normalize=False)
        seen.append(Columns(of_maps, slice(start, start + 10), clusters=False))
    detectors["all/ensemble"] = Ensemble(seen, weights=[1, 1, 1, 1, 2, 2], seed=1)
    kmeans = {
        level: KMeans(3, metric="cosine", n_init=STARTS, random_state=1).fit(features["train"][level])
        for level in ("encoder", "head")
    }
    kmeans["all"] = kmeans["head"]
    expected = {}
    for name, detector in detectors.items():
        level = name.partition("/")[0]
        detector.fit_features(features["train"][level], kmeans[level].labels_)
        scores = {part: detector.predict_features(features[part][level]) for part in "abc"}
        inside = detector.predict_features(features["test"][level])
        row = {
            part: ood_metrics(torch.cat([inside, s]), torch.tensor([False] * len(inside) + [True] * len(s)))
            for part, s in scores.items()
        }
        row["near"] = {metric: (row["a"][metric] + row["b"][metric]) / 2 for metric in row["a"]}
        expected[name] = row | {"far": row["c"]}
        if name == DEFAULT:
            assert_close(evaluation.scores, {"test": inside} | scores)
    assert kmeans["head"].labels_.equal(evaluation.cluster_ids)
    assert kmeans["head"].cluster_centers_.equal(evaluation.centers)
    assert evaluation.metrics.keys() == expected.keys()
    for name, row in expected.items():
        assert evaluation.metrics[name].keys() == row.keys()
        for part, metrics in row.items():
            assert evaluation.metrics[name][part] == pytest.approx(metrics, rel=1e-5), (name, part)
    assert all(expected[f"head/{name}"] != expected[f"encoder/{name}"] for name in of_level)
    assert expected["all/ensemble"] != expected["encoder/ensemble"]
