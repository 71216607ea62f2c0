"""Compiles the CUDA extension, by CMake, where that is wanted and possible; all else is in pyproject.toml.

CCL_FAST_CUDA: auto (the default: if nvcc is found), on (or fail), off.
CCL_FAST_CUDA_ARCHITECTURES: such as "80 90"; by default all that CMakeLists.txt and nvcc know.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
USUAL_PREFIX = "/usr/local/cuda"
OLDEST = (12, 0)


def choose(environment: Mapping[str, str]) -> tuple[str | None, str]:
    """The nvcc to compile with, None for not to compile, and why; SystemExit if what is wanted cannot be."""
    wanted = environment.get("CCL_FAST_CUDA", "auto")
    if wanted not in ("auto", "on", "off"):
        raise SystemExit(f"CCL_FAST_CUDA must be auto, on or off, and is {wanted!r}")
    if wanted == "off":
        return None, "CCL_FAST_CUDA is off"
    nvcc, reason = find_nvcc(environment)
    if not nvcc and wanted == "on":
        raise SystemExit(f"CCL_FAST_CUDA is on, but {reason}")
    return nvcc, reason


def find_nvcc(environment: Mapping[str, str]) -> tuple[str | None, str]:
    """The first nvcc of CUDACXX, PATH, CUDA_HOME, CUDA_PATH and the usual prefix, if it is one to use, and why."""
    if sys.platform != "linux":
        return None, "the CUDA extension is for Linux"
    prefixes = [environment.get("CUDA_HOME"), environment.get("CUDA_PATH"), USUAL_PREFIX]
    folders = [environment.get("PATH", ""), *(os.path.join(prefix, "bin") for prefix in prefixes if prefix)]
    name = environment.get("CUDACXX") or "nvcc"
    nvcc = shutil.which(name, path=os.pathsep.join(folders))
    if not nvcc:
        return None, f"there is no {name} on PATH, under CUDA_HOME or CUDA_PATH, or in {USUAL_PREFIX}"
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    if not release:
        return None, f"{nvcc} --version does not tell the release of CUDA"
    if tuple(map(int, release.groups())) < OLDEST:
        return None, f"{nvcc} is of CUDA {'.'.join(release.groups())}, and {OLDEST[0]} is the oldest that will do"
    return nvcc, f"{nvcc} is of CUDA {'.'.join(release.groups())}"


class CMakeBuild(build_ext):
    def build_extension(self, extension: Extension) -> None:
        # CMake and Ninja may be installed beside this Python, without its environment being active.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        folder = Path(self.build_temp).resolve() / "cmake"
        options = {
            "Python_EXECUTABLE": sys.executable,
            "CMAKE_CUDA_COMPILER": extension.nvcc,
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": Path(self.get_ext_fullpath(extension.name)).resolve().parent,
            "CCL_FAST_CUDA_ARCHITECTURES": os.environ.get("CCL_FAST_CUDA_ARCHITECTURES", ""),
        }
        configure = ["cmake", "--fresh", "-S", ROOT, "-B", folder, *(f"-D{name}={options[name]}" for name in options)]
        if shutil.which("ninja", path=path):
            configure += ["-G", "Ninja"]
        for command in (configure, ["cmake", "--build", folder, "--target", "_cuda"]):
            try:
                subprocess.run(command, check=True, env={**os.environ, "PATH": path})
            except (OSError, subprocess.CalledProcessError) as error:
                raise SystemExit(f"{error}\nTo install without the CUDA extension, set CCL_FAST_CUDA=off.") from error


def main() -> None:
    extensions = []
    # Metadata and the source distribution need no compiler.
    if {"egg_info", "dist_info", "sdist"}.isdisjoint(sys.argv):
        nvcc, reason = choose(os.environ)
        print(f"ccl_fast {'with' if nvcc else 'without'} the CUDA extension: {reason}", flush=True)
        if nvcc:
            extensions = [Extension("ccl_fast._cuda", sources=[])]
            extensions[0].nvcc = nvcc
        elif "editable_wheel" in sys.argv:  # what an earlier installation left in the sources would still be imported
            (ROOT / "ccl_fast" / ("_cuda" + sysconfig.get_config_var("EXT_SUFFIX"))).unlink(missing_ok=True)
    setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild})


if __name__ == "__main__":
    main()
