"""What each kernel of the CUDA extension needs of a GPU, read from the machine code; needs no GPU.

`make registers` prints a table of the installed extension, or if there is none builds it.
Shared memory is what the code itself reserves (1024 bytes are the system's); what a launch adds is not in it.
"""

import re
import shutil
import subprocess
import sysconfig
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from tests import ROOT
from tests.kernels import emulated

NAME = "_cuda" + sysconfig.get_config_var("EXT_SUFFIX")


@dataclass(order=True)
class Usage:
    kernel: str
    architecture: int
    registers: int
    stack: int  # bytes of spilled registers and of arrays that are not in registers
    local: int
    shared: int


def cuobjdump() -> str | None:
    """The toolkit's, or that which comes with Triton."""
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin")
    if found:
        return found
    try:
        import triton
    except ImportError:
        return None
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(tool) if tool.exists() else None


def usage(module: Path) -> list[Usage]:
    """Of every kernel in the module, for every architecture that it has machine code for."""
    command = [cuobjdump(), "--dump-resource-usage", module]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found, architecture, kernel = [], 0, ""
    for line in text.splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            architecture = int(match[1])
        elif match := re.search(r"Function (\S+):", line):
            kernel = match[1]
        elif "REG:" in line:
            numbers = (int(re.search(rf"\b{key}:(\d+)", line)[1]) for key in ("REG", "STACK", "LOCAL", "SHARED"))
            found.append(Usage(kernel, architecture, *numbers))
    names = _demangled([entry.kernel for entry in found])
    for entry, name in zip(found, names, strict=True):
        entry.kernel = name
    return sorted(found)


def _demangled(names: list[str]) -> list[str]:
    """Without namespaces and parameters, which are the same for every instance; unchanged without c++filt."""
    tool = shutil.which("c++filt")
    if not tool or not names:
        return names
    text = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = []
    for name in text.splitlines():
        name = re.sub(r"ccl_fast::|\(anonymous namespace\)::|_GLOBAL__N_\w+::|^void ", "", name)
        short.append(re.sub(r"\((?:int|bool)\)", "", name).partition("(")[0])
    return short


def main() -> None:
    package = ROOT / "ccl_fast" / NAME
    module = package if package.exists() else emulated.compiled_by_nvcc("_cuda")
    rows = [tuple(field.name for field in fields(Usage)), *map(astuple, usage(module))]
    width = max(len(row[0]) for row in rows)
    print(f"{module.relative_to(ROOT)}: bytes, but for the registers")
    for name, *numbers in rows:
        print(f"{name:{width}}", *(f"{number:>12}" for number in numbers))


if __name__ == "__main__":
    main()
