"""A trained model as one file for other programs."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ccl_fast.commands.exporting import OUTPUTS, Input
from ccl_fast.commands.predictor import load_run
from ccl_fast.training.launch import check_alone


def export(
    run: str | Path,
    output: str | Path,
    objective: str | None = None,
    input: Input = "uint8",
    resize: bool = True,
    backbone: str | nn.Module | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a trained model as one file that needs ccl_fast no more: torch.export's (.pt2) or ONNX (.onnx).

    It takes ``images``, any number of images of one size, [n, c, h, w] with any n, h and w and the run's channels,
    bytes or numbers in [0, 1] (which are rounded to bytes, as the run's images are). The run's preprocessing is inside:
    resizing and cropping, to the bit as torchvision does them on bytes. It returns ``features`` [n, width], before the
    head, and ``embeddings`` [n, dim], behind it and not of unit length, float32. Before the file appears under its name
    it is read again and run, ONNX by onnxruntime, on images of several sizes: where a number differs by more than 1e-5
    of the largest from what the run makes of the same images there is no file.

    Args:
        run: folder of a run of ``train``.
        output: a file that ends in .pt2 or .onnx (which needs onnx, onnxscript and onnxruntime).
        objective: whose model; by default the run's objective, not the baseline.
        input: "uint8" or "float32", of the images.
        resize: put resizing and cropping into the file; without, images are of the run's size, and not rounded.
        backbone: the module that the run was trained with, if it was one (Python only).
        overwrite: replace the output file.

    Returns:
        The path of the file.

    Raises:
        ArgumentError: a ValueError naming the argument, or the file that is damaged, what was expected and what came;
            or the network cannot be exported, or does something else then.
        FileExistsError: the output file exists.
        MissingPackages: a package of ONNX is not installed; says how to install it.
    """
    check_alone("export")
    predictor = load_run(run, objective, "cpu", backbone=backbone)
    path = predictor.export(output, input, resize, overwrite=overwrite)
    channels, height, width = predictor.shape
    size = f"h, w] of any size, brought to {height} x {width}" if resize else f"{height}, {width}]"
    print(f"images {input} [n, {channels}, {size} -> {', '.join(OUTPUTS)}; written to {path}")
    return path
