"""Files of tensors and of what describes them: safetensors, with check sums of everything that is in them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from ccl_fast.errors import ArgumentError, first_line
from ccl_fast.files import write_atomically

# Entries of a file's metadata: a JSON text of the description and of every tensor's check sum, and that text's own.
HEADER, CHECK_SUM = "ccl_fast", "sha256"


class TensorFile(NamedTuple):
    """What a file has: tensors by name, plain values that describe them, and the check sum of all of it."""

    tensors: dict[str, Tensor]
    description: dict[str, Any]
    check_sum: str


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any], *, equal_once: bool = False
) -> None:
    """Write tensors and plain values that describe them.

    Args:
        path: of the file.
        tensors: by name.
        description: what JSON can keep.
        equal_once: of tensors that are equal the file has the first one alone; `read_tensors` gives all of them.

    Raises:
        OSError: it could not be written; the old file is as it was.
    """
    # Copies, as safetensors refuses tensors that share memory, such as tied weights.
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    sums = {name: _sum(tensor) for name, tensor in tensors.items()}
    kept = tensors
    if equal_once:
        first = {of: name for name, of in reversed(sums.items())}
        kept = {name: tensors[name] for name in first.values()}
    header = json.dumps({"description": description, "tensors": sums}, allow_nan=False)
    metadata = {HEADER: header, CHECK_SUM: hashlib.sha256(header.encode()).hexdigest()}
    content = safetensors.torch.save(kept, metadata)
    write_atomically(path, lambda file: file.write(content))


def read_tensors(path: Path, what: str) -> TensorFile:
    """Read a file of `write_tensors`, onto the CPU.

    Args:
        path: of the file.
        what: it should be, in an error.

    Raises:
        ArgumentError: it is not there, damaged or something else, or a number in it is not finite.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            found = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 (it is no dict)
        if HEADER not in metadata:
            raise ValueError("a file of safetensors without a description of ccl_fast's")
        header = json.loads(metadata[HEADER])
        check_sum = hashlib.sha256(metadata[HEADER].encode()).hexdigest()
        by_sum = {_sum(tensor): tensor for tensor in found}
        if check_sum != metadata.get(CHECK_SUM) or by_sum.keys() != set(header["tensors"].values()):
            raise ValueError("damaged: it does not have its check sums")
        if not all(tensor.isfinite().all() for tensor in found if tensor.is_floating_point()):
            raise ValueError("values that are not finite")
        tensors = {name: by_sum[of] for name, of in header["tensors"].items()}
        return TensorFile(tensors, dict(header["description"]), check_sum)
    except Exception as error:  # whatever a damaged or foreign file makes safetensors and json say
        raise ArgumentError(f"run: expected {what} of this run, got {path} ({first_line(error)})") from error


def check_writable(tensors: Mapping[str, object]) -> None:
    """Check that a file can keep the weights of a backbone.

    Raises:
        ArgumentError: one is no tensor, or none that safetensors knows.
    """
    for name, value in tensors.items():
        try:
            if not isinstance(value, Tensor):
                raise ValueError(type(value).__name__)
            safetensors.torch.save({name: value.detach().cpu().contiguous()})
        except Exception as error:
            expected = "a module whose state_dict has tensors that safetensors can keep, and nothing else"
            raise ArgumentError(f"backbone: expected {expected}, got {name} ({first_line(error)})") from error


def _sum(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and values."""
    result = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    result.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return result.hexdigest()
