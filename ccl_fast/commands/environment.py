"""Where a report was made: versions, device, commit."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import datetime
from importlib import metadata
from pathlib import Path

import torch

from ccl_fast.version import __version__

# Whose versions matter to what a run finds, besides torch's.
PACKAGES = ("numpy", "scipy", "scikit-learn", "torchvision", "lightning", "kornia", "triton")


def describe_environment(device: torch.device) -> dict:
    """Return versions, device and time, and the commit of ccl_fast if it is known."""
    is_cuda = device.type == "cuda"
    environment = {
        "ccl_fast": __version__,
        "commit": find_commit(),
        "torch": torch.__version__,
        **{name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": describe_device(device),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if is_cuda else None,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    return {name: value for name, value in environment.items() if value is not None}


def describe_device(device: torch.device) -> str:
    """Return a device's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {os.cpu_count()} cores"


def find_commit() -> str | None:
    """Return the commit that ccl_fast is of, "+" behind it if files differ; None if it is not known.

    It is that of the repository that the files lie in, if they belong to it, or the one that pip installed from.
    """
    folder = Path(__file__).parent
    if _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is not None:
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", str(folder.parent))
        return commit and commit + "+" * bool(changed)
    try:
        origin = json.loads(metadata.distribution("ccl-fast").read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        return None
    return origin.get("vcs_info", {}).get("commit_id")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
