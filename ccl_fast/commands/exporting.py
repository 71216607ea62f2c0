"""A model written for other programs, as a program of torch.export's or as ONNX, and compared with what it was."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Literal, get_args

import torch
from torch import Tensor, nn

from ccl_fast.checks import check_choice, check_flag
from ccl_fast.commands.exported_resize import fit_batch
from ccl_fast.commands.run_folder import check_output
from ccl_fast.data.pixels import fit
from ccl_fast.errors import ArgumentError, first_line, packages_of
from ccl_fast.files import write_atomically
from ccl_fast.models import Model

Input = Literal["uint8", "float32"]

PT2, ONNX = ".pt2", ".onnx"
OUTPUTS = ("features", "embeddings")
# Of what the file gives, by the largest of the model's numbers.
TOLERANCE = 1e-5
# Images of a batch in the check, one and more than it was exported with; and their sizes, by those of the model.
CHECKED = ((1, (1, 1)), (5, (1, 1)))
RESIZED = (*CHECKED, (2, (2.6, 1.7)), (1, (0.6, 1.9)))

# Images -> features and embeddings.
Runs = Callable[[Tensor], tuple[Tensor, Tensor]]


def export_model(
    model: Model, shape: tuple[int, int, int], output: str | Path, input: Input, resize: bool, *, overwrite: bool
) -> Path:
    """Write a model for images of a shape; as `ccl_fast.commands.export` says."""
    path = Path(output)
    writers = {PT2: _write_pt2, ONNX: _write_onnx}
    if path.suffix not in writers:
        raise ArgumentError(f"output: expected a file that ends in {PT2} or {ONNX}, got {str(output)!r}")
    check_choice("input", input, get_args(Input))
    check_flag("resize", resize)
    check_output(path, overwrite=overwrite)
    if path.suffix == ONNX:
        _check_packages()
    module = _Whole(copy.deepcopy(model).cpu().eval(), shape, is_bytes=input == "uint8", resizes=resize).eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: _write(writers[path.suffix], module, file))
    return path


class _Whole(nn.Module):
    """A model with what comes before it: images [n, c, h, w] -> features [n, width] and embeddings [n, dim].

    Args:
        model: in evaluation mode.
        shape: (c, h, w) of the images that it takes.
        is_bytes: the images are uint8, and not numbers in [0, 1].
        resizes: they are of any size, and brought to the model's.
    """

    def __init__(self, model: Model, shape: tuple[int, int, int], *, is_bytes: bool, resizes: bool):
        super().__init__()
        self.model, self.shape, self.is_bytes, self.resizes = model, shape, is_bytes, resizes

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self.resizes:
            pixels = images if self.is_bytes else (images.clamp(0, 1) * 255).round()
            images = fit_batch(pixels, *self.shape[1:]).float() / 255
        elif self.is_bytes:
            images = images.float() / 255
        return self.of_model(images)

    def of_model(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the model makes of float32 images of its size."""
        features = self.model.features(images).float()
        return features, self.model.head(features)

    @property
    def dynamic(self) -> dict[int, torch.export.Dim]:
        """The dimensions of images that may have any length."""
        names = {0: "n"} | ({2: "h", 3: "w"} if self.resizes else {})
        return {dimension: torch.export.Dim(name, min=1) for dimension, name in names.items()}


def _write(write: Callable[[torch.export.ExportedProgram, BinaryIO], Runs], module: _Whole, file: BinaryIO) -> None:
    """Export, write, read again and compare."""
    checked = RESIZED if module.resizes else CHECKED
    try:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # of what torch does itself
            # No two lengths the same, lest they be taken for one.
            example = _images(module, 2, (2.6, 1.7) if module.resizes else (1, 1))
            program = torch.export.export(module, (example,), dynamic_shapes={"images": module.dynamic})
            runs = write(program, file)
            for n, sizes in checked:
                images = _images(module, n, sizes)
                _compare(runs(images), module.of_model(_fitted(images, module.shape)))
    except (ArgumentError, OSError):
        raise
    except Exception as error:  # the network may be anybody's, and exporters say what they like
        expected = "a network that can be exported"
        raise ArgumentError(f"run: expected {expected}, got {type(error).__name__}: {first_line(error)}") from error


def _images(module: _Whole, n: int, sizes: tuple[float, float]) -> Tensor:
    """Random images that are so many times as high and as wide as those that the model takes."""
    random = torch.Generator().manual_seed(n)
    channels, height, width = module.shape
    shape = (n, channels, round(height * sizes[0]), round(width * sizes[1]))
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=random, device="cpu")
    return pixels if module.is_bytes else pixels.float() / 255


def _fitted(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """What the preprocessing of the run makes of images."""
    pixels = images if images.dtype == torch.uint8 else (images * 255).round().byte()
    return torch.stack([fit(image, shape) for image in pixels]).float() / 255


def _compare(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for name, ours, models in zip(OUTPUTS, found, expected, strict=True):
        difference = (ours - models).abs().max().item()
        if not difference <= TOLERANCE * max(1.0, models.abs().max().item()):
            said = f"the model's {name} up to {TOLERANCE:g}"
            raise ArgumentError(f"output: expected {said} from the exported file, got others by {difference:.3g}")


def _write_pt2(program: torch.export.ExportedProgram, file: BinaryIO) -> Runs:
    content = io.BytesIO()
    torch.export.save(program, content)
    file.write(content.getvalue())
    return torch.export.load(io.BytesIO(content.getvalue())).module()


def _write_onnx(program: torch.export.ExportedProgram, file: BinaryIO) -> Runs:
    import onnxruntime

    exported = torch.onnx.export(
        program, input_names=["images"], output_names=list(OUTPUTS), dynamo=True, verbose=False
    )
    assert exported is not None  # without a file to write to
    content = exported.model_proto.SerializeToString()
    file.write(content)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def runs(images: Tensor) -> tuple[Tensor, Tensor]:
        features, embeddings = session.run(list(OUTPUTS), {"images": images.numpy()})
        return torch.from_numpy(features), torch.from_numpy(embeddings)

    return runs


def _check_packages() -> None:
    with packages_of("export", instead=f"an output that ends in {PT2}"):
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
