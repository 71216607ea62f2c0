"""The CUDA sources built for a test: for the CPU, with csrc/emulation.h in place of a GPU, or by nvcc.

Built once for each state of the sources, into the ignored folder `build/emulated`.
"""

import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType

from tests import ROOT


@cache
def build() -> ModuleType:
    """The module `_cuda_emulated`: that of csrc/bindings.cpp, and `set_schedule(seed)`."""
    return load(compiled("_cuda_emulated", "-DCCL_FAST_EMULATE=ON"))


@cache
def build_selftest() -> ModuleType:
    """The module of emulation_selftest.cu."""
    return load(compiled("_selftest", "-DCCL_FAST_EMULATE=ON"))


def nvcc() -> tuple[str | None, str]:
    """The nvcc that an installation would use, or None, and why."""
    return load(ROOT / "setup.py").find_nvcc(os.environ)


def compiled_by_nvcc(name: str, architectures: str = "") -> Path:
    """`_cuda` or `_selftest` for these architectures, such as "80 90", or for all."""
    compiler, reason = nvcc()
    if not compiler:
        raise RuntimeError(reason)
    options = [f"-DCMAKE_CUDA_COMPILER={compiler}", f"-DCCL_FAST_CUDA_ARCHITECTURES={architectures}"]
    return compiled(name, *options, "-DCCL_FAST_SELFTEST=ON")


def compiled(name: str, *options: str) -> Path:
    """Where the extension module `name` lies, which is built by CMake with these options if it is not there yet."""
    sources = [
        ROOT / "CMakeLists.txt",
        ROOT / "tests" / "kernels" / "emulation_selftest.cu",
        *sorted((ROOT / "csrc").glob("*")),
    ]
    key = hashlib.sha256(repr((sys.version, options)).encode())
    for source in sources:
        key.update(source.name.encode() + source.read_bytes())
    folder = ROOT / "build" / "emulated" / key.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    module = folder / (name + sysconfig.get_config_var("EXT_SUFFIX"))
    with open(folder / "lock", "w") as lock:  # the tests' processes all come here at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not module.exists():
            configure = ["cmake", "--fresh", "-G", "Ninja", "-S", ROOT, "-B", folder]
            _run([*configure, f"-DPython_EXECUTABLE={sys.executable}", *options])
            _run(["cmake", "--build", folder, "--target", name])
    return module


def load(path: Path) -> ModuleType:
    """Import a module from where it lies."""
    spec = importlib.util.spec_from_file_location(path.name.partition(".")[0], path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(command: list) -> None:
    """A failure shows what CMake and the compiler said."""
    # CMake and Ninja may be installed beside this Python, without its environment being active.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path}
    done = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout}")
