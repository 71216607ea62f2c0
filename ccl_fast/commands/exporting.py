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

from ccl_fast.checks import check_choice
from ccl_fast.commands.run_folder import check_output
from ccl_fast.errors import ArgumentError, first_line, packages_of
from ccl_fast.files import write_atomically
from ccl_fast.models import Model

Input = Literal["uint8", "float32"]

PT2, ONNX = ".pt2", ".onnx"
OUTPUTS = ("features", "embeddings")
# Of what the file gives, by the largest of the model's numbers.
TOLERANCE = 1e-5
# Images of a batch in the check: one, and more than it was exported with.
CHECKED = (1, 5)

# Images -> features and embeddings.
Runs = Callable[[Tensor], tuple[Tensor, Tensor]]


def export_model(
    model: Model, shape: tuple[int, int, int], output: str | Path, input: Input, *, overwrite: bool
) -> Path:
    """Write a model for images of a shape; as `ccl_fast.commands.export` says."""
    path = Path(output)
    writers = {PT2: _write_pt2, ONNX: _write_onnx}
    if path.suffix not in writers:
        raise ArgumentError(f"output: expected a file that ends in {PT2} or {ONNX}, got {str(output)!r}")
    check_choice("input", input, get_args(Input))
    check_output(path, overwrite=overwrite)
    if path.suffix == ONNX:
        _check_packages()
    module = _Whole(copy.deepcopy(model).cpu().eval(), is_bytes=input == "uint8").eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: _write(writers[path.suffix], module, shape, file))
    return path


class _Whole(nn.Module):
    """A model with what comes before it: images [n, c, h, w] -> features [n, width] and embeddings [n, dim].

    Args:
        model: in evaluation mode.
        is_bytes: the images are uint8, and not numbers in [0, 1].
    """

    def __init__(self, model: Model, *, is_bytes: bool):
        super().__init__()
        self.model, self.is_bytes = model, is_bytes

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.model.features(images.float() / 255 if self.is_bytes else images).float()
        return features, self.model.head(features)


def _write(
    write: Callable[[torch.export.ExportedProgram, BinaryIO], Runs],
    module: _Whole,
    shape: tuple[int, int, int],
    file: BinaryIO,
) -> None:
    """Export, write, read again and compare."""
    n = torch.export.Dim("n", min=1)
    try:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # of what torch does itself
            example = _images(module, shape, 2)
            program = torch.export.export(module, (example,), dynamic_shapes={"images": {0: n}})
            runs = write(program, file)
            for size in CHECKED:
                images = _images(module, shape, size)
                _compare(runs(images), module(images))
    except (ArgumentError, OSError):
        raise
    except Exception as error:  # the network may be anybody's, and exporters say what they like
        expected = "a network that can be exported"
        raise ArgumentError(f"run: expected {expected}, got {type(error).__name__}: {first_line(error)}") from error


def _images(module: _Whole, shape: tuple[int, int, int], n: int) -> Tensor:
    random = torch.Generator().manual_seed(n)
    pixels = torch.randint(256, (n, *shape), dtype=torch.uint8, generator=random, device="cpu")
    return pixels if module.is_bytes else pixels.float() / 255


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
