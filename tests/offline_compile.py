"""Compile the Triton kernels for GPUs that are not there, and read what the machine code needs.

`python tests/offline_compile.py` (`make launch-table`) prints a line of JSON for every shipped launch and architecture.
"""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ccl_fast.kernels import streaming_logsumexp as kernels
from ccl_fast.kernels.launch import TABLE, Launch, launch

ARCHITECTURES = (80, 90, 100)
# The instruction that multiplies matrices in each generation's machine code.
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: r"UTC\w*MMA"}
DTYPES = {2: "bf16", 4: "fp32"}


@dataclass
class Report:
    registers: int
    spill_instructions: int
    shared_bytes: int
    tensor_core_instructions: int


def compile_kernel(kernel: str, element: str, entry: Launch, d: int, arch: int, precision="tf32", **variant) -> Report:
    """`variant` overrides constexprs; ids=True gives cluster ids, bias=True a key bias."""
    fn = getattr(kernels, kernel)
    ids, bias, flag = variant.pop("ids", False), variant.pop("bias", False), variant.pop("flag", False)
    constants = {
        "D": d,
        "BLOCK_D": entry.block_d,
        "BLOCK": entry.block_m,
        "BLOCK_M": entry.block_m,
        "BLOCK_N": entry.block_n,
        "PRECISION": precision,
        "IS_SELF": True,
        "WANT_SAME": ids,
        "WANT_OTHER": True,
        "ROW_ANCHORS": True,
        "COL_ANCHORS": True,
        "RUN_IF_BOUNDED": False,
    } | variant
    absent = {} if bias else {"bias_ptr": None, "bias_grad_ptr": None}
    if not ids:
        absent |= dict.fromkeys(("q_ids_ptr", "k_ids_ptr", "ids_ptr", "a_ids_ptr", "b_ids_ptr"))
    if not flag and kernel != "forward_triangle":
        absent["bounded_ptr"] = None
    signature, attributes, constexprs = {}, {}, {}
    for i, name in enumerate(fn.arg_names):
        if name in constants or name in absent:
            signature[name], constexprs[name] = "constexpr", constants.get(name)
        elif name.endswith("_col"):  # contiguous rows: stride one
            signature[name], constexprs[name] = "constexpr", 1
        elif name.endswith("ids_ptr") or name == "bounded_ptr":
            signature[name] = "*i32"
        elif name in ("q_ptr", "k_ptr", "a_ptr", "b_ptr", "z_ptr", "out_ptr"):
            signature[name] = f"*{element}"
        else:
            signature[name] = "*fp32" if name.endswith("_ptr") else "i32"
        # Pointers and the anchors of the columns are aligned, and a row is a multiple of 16 elements; block counts and
        # other offsets are anything.
        if name.endswith(("_ptr", "_row", "col_anchor")) and signature[name] != "constexpr":
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn, signature, constexprs, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=entry.options)
    return _read(compiled, arch)


def _read(compiled, arch: int) -> Report:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def run(option):
            done = subprocess.run([tools / "cuobjdump", option, file.name], capture_output=True, text=True, check=True)
            return done.stdout

        usage, code = run("-res-usage"), run("-sass")
    return Report(
        registers=int(re.search(r"REG:(\d+)", usage).group(1)),
        spill_instructions=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared_bytes=compiled.metadata.shared,
        tensor_core_instructions=len(re.findall(rf"\b{TENSOR_CORE[arch]}\b", code)),
    )


def variants(kernel: str, ids: bool) -> list[dict]:
    """The ways a kernel is launched, by what changes its machine code."""
    rectangular = {"IS_SELF": False, "bias": True}
    if kernel == "backward_rows":
        found = [{"RUN_IF_BOUNDED": True, "flag": True}, {}]
        found += [rectangular | {"COL_ANCHORS": False}, rectangular | {"ROW_ANCHORS": False}]
        found += [{"IS_SELF": False, "RUN_IF_BOUNDED": bounded, "flag": True} for bounded in (False, True)]
    elif kernel == "backward_weights":
        found = [{}, {"IS_SELF": False}, rectangular | {"COL_ANCHORS": False}]
    elif kernel == "forward_triangle":
        found = [{}]
    else:
        found = [{}, rectangular]
    return [variant | {"ids": ids} for variant in found]


def shipped() -> list[tuple[str, int, int, bool]]:
    """Each launch of the table: kernel, bytes per element, a D that it serves, and whether there are ids."""
    return [
        (kernel, size, min(entry.limit, 1024), ids)
        for (kernel, size), entries in TABLE.items()
        for entry in entries
        for ids in (False, True)
    ]


def main() -> None:
    """Print a line for each launch, variant and architecture; with an argument K only for the K-th of `shipped()`."""
    wanted = shipped() if len(sys.argv) == 1 else [shipped()[int(sys.argv[1])]]
    for kernel, size, d, ids in wanted:
        chosen = launch(kernel, {2: torch.bfloat16, 4: torch.float32}[size], d, ids)
        for variant in variants(kernel, ids):
            for arch in ARCHITECTURES:
                report = compile_kernel(kernel, DTYPES[size], chosen, d, arch, **variant)
                line = {"kernel": kernel, "dtype": DTYPES[size], "D": d, "arch": arch, "launch": list(chosen)}
                print(json.dumps(line | {"variant": variant} | asdict(report)), flush=True)


if __name__ == "__main__":
    main()
