"""Encoders by name, and what is said where one cannot be built."""

import dataclasses

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")

import timm
import torchvision
from safetensors.torch import save_file

from ccl_fast.data.images import InMemory
from ccl_fast.errors import ArgumentError
from ccl_fast.models import LayerStatistics, Model, build_backbone, embed, embed_layers


@pytest.mark.parametrize(
    ("name", "shape", "width"),
    [
        ("small", (1, 28, 28), 128),
        ("small", (3, 50, 40), 128),
        ("resnet8", (3, 32, 32), 128),
        ("resnet8", (1, 27, 35), 128),
        ("resnet18", (3, 32, 32), 512),
        ("resnet18", (1, 28, 28), 512),
        ("resnet50", (3, 96, 96), 2048),
        ("mobilenet_v3_small", (3, 64, 64), 1024),
        ("convnext_tiny", (3, 64, 64), 768),
        ("vit_b_32", (3, 64, 64), 768),
        ("swin_t", (1, 64, 64), 768),
        ("densenet121", (3, 64, 64), 1024),
        ("googlenet", (3, 64, 64), 1024),
        ("vgg11_bn", (3, 64, 64), 4096),
        ("efficientnet_b0", (3, 64, 64), 1280),
        ("shufflenet_v2_x0_5", (3, 64, 64), 1024),
        ("timm/resnet10t", (3, 32, 32), 512),
        ("timm/resnet18", (1, 32, 32), 512),
        ("timm/vit_tiny_patch16_224", (3, 48, 48), 192),
        ("timm/convnext_atto", (3, 64, 64), 320),
    ],
)
def test_named_backbones_give_features(name, shape, width):
    backbone, found = build_backbone(name, shape)
    assert found == width
    assert backbone.training and all(module.training for module in backbone.modules())
    features = backbone.eval()(torch.rand(3, *shape))
    assert features.shape == (3, width)
    assert features.std(dim=0).max() > 0  # of different images, different ones


def test_the_small_stem_keeps_the_resolution_and_can_be_chosen():
    def first(backbone):
        return next(m for m in backbone.modules() if isinstance(m, nn.Conv2d))

    for size, stem, kernel in [(32, "auto", 3), (64, "auto", 3), (65, "auto", 7), (32, "7x7", 7), (96, "3x3", 3)]:
        for name in ("resnet18", "timm/resnet18"):
            backbone, _ = build_backbone(name, (3, size, size), stem=stem)
            convolution = first(backbone)
            assert convolution.kernel_size == (kernel, kernel)
            assert convolution.stride == ((1, 1) if kernel == 3 else (2, 2))
            assert isinstance(backbone.maxpool, nn.Identity) == (kernel == 3)


def test_the_seed_fixes_the_weights_and_leaves_the_generator_alone():
    before = torch.get_rng_state()
    first, again, other = (Model("resnet18", (3, 32, 32), seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.get_rng_state().equal(before)
    assert all(first[name].equal(again[name]) for name in first)
    assert not first["encoder.conv1.weight"].equal(other["encoder.conv1.weight"])
    assert not first["head.0.weight"].equal(other["head.0.weight"])


def test_a_module_is_copied_with_its_weights():
    given = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(12, 5)).train()
    built, width = build_backbone(given, (3, 2, 2))
    assert width == 5
    assert built is not given and built[2].weight.equal(given[2].weight)
    assert built[1].training
    with torch.no_grad():
        built[2].weight.zero_()
    assert given[2].weight.abs().max() > 0


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "timm/resnet18", "timm/vit_tiny_patch16_224"])
@pytest.mark.parametrize("channels", [1, 3])
def test_pretrained_weights_of_a_file(name, channels, tmp_path):
    """Of a whole classifier, as the library publishes it; images are normalised as it expects."""
    if name.startswith("timm/"):
        whole = timm.create_model(name[5:], pretrained=False).eval()
        path, size = tmp_path / "weights.safetensors", 224
        save_file(whole.state_dict(), path)
        mean, std = (torch.tensor(whole.pretrained_cfg[of]).view(-1, 1, 1) for of in ("mean", "std"))
        whole.reset_classifier(0)
    else:
        special = {"init_weights": True, "transform_input": True} if name == "googlenet" else {}
        whole = torchvision.models.get_model(name, weights=None, **special).eval()
        path, size = tmp_path / "weights.pth", 64
        torch.save(whole.state_dict(), path)
        transforms = torchvision.models.get_model_weights(name)["DEFAULT"].transforms()
        mean, std = (torch.tensor(of).view(-1, 1, 1) for of in (transforms.mean, transforms.std))
        whole.fc = nn.Identity()
    shape = (channels, size, size)
    images = torch.rand(2, *shape)
    wanted = whole((images.expand(-1, 3, -1, -1) - mean) / std)
    built, _ = build_backbone(name, shape, pretrained=str(path), seed=3)
    torch.testing.assert_close(built.eval()(images), wanted)
    # A run's own weights replace them: the file need not be there any more.
    path.unlink()
    again, _ = build_backbone(name, shape, pretrained=str(path), load=False)
    again.load_state_dict(built.state_dict())
    torch.testing.assert_close(again.eval()(images), wanted)


def test_published_weights_are_asked_of_the_library(monkeypatch):
    state = torchvision.models.resnet18(weights=None).state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: state)
    built, _ = build_backbone("resnet18", (3, 32, 32), pretrained=True)
    assert built.network.conv1.weight.equal(state["conv1.weight"]) and built.normalizes

    def refuse(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with pytest.raises(ArgumentError, match=r"weights can be loaded, got 'resnet18' \(no route"):
        build_backbone("resnet18", (3, 32, 32), pretrained=True)
    with pytest.raises(ArgumentError, match=r"^stem: expected .*, which have their own"):
        build_backbone("resnet18", (3, 32, 32), pretrained=True, load=False, stem="3x3")


def test_what_hugging_face_returns_is_pooled():
    @dataclasses.dataclass
    class Output:
        last_hidden_state: torch.Tensor
        pooler_output: torch.Tensor | None = None

    class Network(nn.Module):
        def __init__(self, hidden, pooled):
            super().__init__()
            self.hidden, self.pooled = hidden, pooled

        def forward(self, pixel_values):
            rows = pixel_values.flatten(1)[:, :12]
            return Output(rows.unflatten(1, self.hidden), rows[:, :, None, None] if self.pooled else None)

    images = torch.rand(3, 3, 8, 8)
    rows = images.flatten(1)[:, :12]
    for hidden, pooled, wanted in [
        ((3, 4), True, rows),
        ((3, 4), False, rows.unflatten(1, (3, 4)).mean(1)),
        ((3, 2, 2), False, rows.unflatten(1, (3, 4)).mean(2)),
    ]:
        built, width = build_backbone(Network(hidden, pooled), (3, 8, 8))
        assert width == wanted.shape[1] and built(images).allclose(wanted)


@pytest.mark.parametrize(
    ("backbone", "options", "said"),
    [
        ("resnet19", {}, "did you mean resnet1"),
        ("timm/resnet_19", {}, "did you mean timm/resnet"),
        ("timm/convnext_atto", {"stem": "3x3"}, "^stem: expected"),
        ("resnet18", {"pretrained": "no/such.pth"}, "^pretrained: expected .* a file of weights"),
        ("small", {"pretrained": True}, "^pretrained: expected false for small"),
        (nn.Flatten(), {"pretrained": True}, "^pretrained: expected false for a module"),
        ("resnet18", {"pretrained": __file__}, "weights can be loaded"),
        ("timm/resnet18", {"pretrained": __file__}, "weights can be loaded"),
        ("squeezenet1_0", {}, "ends in a linear layer"),
        ("vit_b_16", {"shape": (3, 30, 30)}, "vit_b_16"),
        ("densenet121", {"shape": (3, 8, 8)}, "densenet121"),
        ("convnext_tiny", {"stem": "3x3"}, "^stem: expected"),
        (nn.Conv2d(3, 4, 3), {}, r"got torch.float32 \[2, 4, 30, 30\] of Conv2d"),
        (nn.Linear(7, 4), {}, "got Linear"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3072, 4)).double(), {}, "got Sequential"),
        (nn.Flatten(), {"stem": "3x3"}, "^stem: expected"),
        ("small", {"stem": "3x3"}, "^stem: expected"),
        ("resnet8", {"stem": "3x3"}, "^stem: expected"),
        (nn.Sequential(nn.Flatten(0)), {}, r"returns features \[n, width\]"),
    ],
)
def test_what_is_no_backbone_is_named(backbone, options, said):
    with pytest.raises(ArgumentError, match=said):
        build_backbone(backbone, options.pop("shape", (3, 32, 32)), **options)


@pytest.mark.parametrize(
    ("backbone", "shape", "widths"),
    [
        ("small", (1, 28, 28), [64, 64, 128, 128, 256, 256]),
        ("resnet8", (3, 32, 32), [64, 64, 64, 128, 256]),
        # conv1, relu, the pooling of 7x7 stems is gone, two blocks of each of four widths; 256 of 512 channels
        ("resnet18", (3, 32, 32), [128] * 4 + [256] * 2 + [512] * 4),
        ("vit_b_32", (3, 32, 32), []),
        ("resnet18", (1, 32, 32), [128] * 4 + [256] * 2 + [512] * 4),
    ],
)
def test_the_statistics_of_layers_are_beside_the_features(backbone, shape, widths):
    model = Model(backbone, shape)
    images = InMemory(torch.randint(256, (3, *shape), dtype=torch.uint8))
    features, found = embed_layers(model.train(), images)
    assert model.training and not any(module._forward_hooks for module in model.modules())
    assert found == [features["head"].shape[1], features["encoder"].shape[1], *widths]
    assert features["all"].shape == (3, sum(found)) and features["all"].isfinite().all()
    plain = embed(model, images)
    torch.testing.assert_close({level: features[level] for level in plain}, plain)


def test_statistics_are_means_and_deviations_over_positions():
    encoder = nn.Sequential(nn.Conv2d(2, 300, 1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    images = torch.randn(5, 2, 4, 4)
    with torch.no_grad(), LayerStatistics(encoder) as layers:
        encoder(torch.randn(7, 2, 4, 4))
        features = encoder(images)
    assert [list(of.shape) for of in layers.statistics] == [[5, 512], [5, 512]]
    means, deviations = layers.statistics[1].chunk(2, 1)
    kept = [(features - mean[:, None]).abs().sum(0).argmin().item() for mean in means.T]
    assert len(set(kept)) == 256  # of the channels, each once
    torch.testing.assert_close(means, features[:, kept])
    maps = encoder[1](encoder[0](images)).flatten(2)[:, kept]
    torch.testing.assert_close(deviations, maps.std(2, correction=0))
