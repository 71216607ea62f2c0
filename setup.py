"""Compiles the extensions, by CMake, where that is wanted and possible; all else is in pyproject.toml.

CCL_FAST_CPU: auto (the default: if a C++ compiler is found), on (or fail), off.
CCL_FAST_CUDA: auto (the default: if nvcc is found), on (or fail), off.
CCL_FAST_CUDA_ARCHITECTURES: such as "80 90"; by default all that CMakeLists.txt and nvcc know.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
USUAL_PREFIX = "/usr/local/cuda"
OLDEST = (12, 0)


def choose(environment: Mapping[str, str], of: str) -> tuple[str | None, str]:
    """The compiler of the extension "CPU" or "CUDA", None for not to compile, and why; SystemExit if it is wanted and
    cannot be compiled."""
    variable, find = f"CCL_FAST_{of}", {"CPU": find_cxx, "CUDA": find_nvcc}[of]
    wanted = environment.get(variable, "auto")
    if wanted not in ("auto", "on", "off"):
        raise SystemExit(f"{variable} must be auto, on or off, and is {wanted!r}")
    if wanted == "off":
        return None, f"{variable} is off"
    compiler, reason = find(environment)
    if not compiler and wanted == "on":
        raise SystemExit(f"{variable} is on, but {reason}")
    return compiler, reason


def find_cxx(environment: Mapping[str, str]) -> tuple[str | None, str]:
    """The C++ compiler that CXX names, or the first of the usual ones on PATH, and why."""
    if sys.platform not in ("linux", "darwin"):
        return None, "it needs GCC's or Clang's vectors"
    names = shlex.split(environment.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    for name in names:
        if compiler := shutil.which(name, path=environment.get("PATH", "")):
            return compiler, f"the compiler is {compiler}"
    return None, f"there is no {' or '.join(names)} on PATH"


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
        module = extension.name.rpartition(".")[2]
        folder = Path(self.build_temp).resolve() / f"cmake{module}"
        options = {
            "Python_EXECUTABLE": sys.executable,
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": Path(self.get_ext_fullpath(extension.name)).resolve().parent,
            **extension.options,
        }
        configure = ["cmake", "--fresh", "-S", ROOT, "-B", folder, *(f"-D{name}={options[name]}" for name in options)]
        if shutil.which("ninja", path=path):
            configure += ["-G", "Ninja"]
        for command in (configure, ["cmake", "--build", folder, "--target", module]):
            try:
                subprocess.run(command, check=True, env={**os.environ, "PATH": path})
            except (OSError, subprocess.CalledProcessError) as error:
                if extension.optional:  # a warning
                    raise CompileError(f"ccl_fast without {extension.name}: {error}") from error
                switch = f"CCL_FAST{module.upper()}=off"
                raise SystemExit(f"{error}\nTo install without this extension, set {switch}.") from error


def main() -> None:
    architectures = os.environ.get("CCL_FAST_CUDA_ARCHITECTURES", "")
    options = {
        "CPU": lambda compiler: {"CCL_FAST_CUDA": "OFF"},  # CMake searches as `find_cxx` does
        "CUDA": lambda nvcc: {"CMAKE_CUDA_COMPILER": nvcc, "CCL_FAST_CUDA_ARCHITECTURES": architectures},
    }
    extensions = []
    # Metadata and the source distribution need no compiler.
    wanted = ("CPU", "CUDA") if {"egg_info", "dist_info", "sdist"}.isdisjoint(sys.argv) else ()
    for of in wanted:
        compiler, reason = choose(os.environ, of)
        print(f"ccl_fast {'with' if compiler else 'without'} the {of} extension: {reason}", flush=True)
        if compiler:
            # Without Python's headers, say, an installation goes on without what nobody has asked for.
            optional = of == "CPU" and os.environ.get("CCL_FAST_CPU") != "on"
            extensions.append(Extension(f"ccl_fast._{of.lower()}", sources=[], optional=optional))
            extensions[-1].options = options[of](compiler)
        elif "editable_wheel" in sys.argv:  # what an earlier installation left in the sources would still be imported
            left = f"_{of.lower()}{sysconfig.get_config_var('EXT_SUFFIX')}"
            (ROOT / "ccl_fast" / left).unlink(missing_ok=True)
    setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild})


if __name__ == "__main__":
    main()
