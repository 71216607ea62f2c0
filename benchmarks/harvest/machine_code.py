"""Counts in the machine code of the shipped launches, for the prediction: compiled for sm_90, no GPU needed."""

import re
import subprocess
import tempfile
from math import ceil
from pathlib import Path

import offline_compile
import torch
import triton

from benchmarks.harvest import plan
from benchmarks.harvest.prediction import Counts, kernels, name_of
from ccl_fast.kernels.launch import launch

ARCHITECTURE = 90
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)$")
VARIANTS = {"backward_rows": {"RUN_IF_BOUNDED": True, "flag": True}}


def counts_of_shipped_launches() -> dict[str, Counts]:
    """By `prediction.name_of`, for every kernel that a case of stage `losses` uses."""
    found = {}
    for problem in plan.PROBLEMS:
        for which in plan.PASSES:
            # The first that takes this D is the one that is used.
            for kernel in (name.split()[0] for name in kernels(problem, which)):
                chosen = launch(kernel, torch.bfloat16, problem.d, problem.ids)
                name = name_of(kernel, problem)
                if chosen is not None:
                    if name not in found:
                        print(name, list(chosen), flush=True)
                        found[name] = count(kernel, chosen, problem.d, problem.ids)
                    break
    return found


def count(kernel: str, chosen, d: int, ids: bool) -> Counts:
    compiled = []
    original = triton.compile
    triton.compile = lambda *a, **k: compiled.append(original(*a, **k)) or compiled[-1]
    try:
        variant = VARIANTS.get(kernel, {}) | {"ids": ids}
        report = offline_compile.compile_kernel(kernel, "bf16", chosen, d, ARCHITECTURE, **variant)
    finally:
        triton.compile = original
    instructions, exponentials = per_tile(_sass(compiled[-1].asm["cubin"]), ceil(d / chosen.block_d))
    return Counts(kernel, tuple(chosen[:5]), report.registers, report.shared_bytes, instructions, exponentials)


def per_tile(sass: str, chunks: int) -> tuple[int, int]:
    """Instructions and exponentials of one tile: of the loop over tiles, in which one over chunks of D may lie.

    Of several loops over tiles that without masks has the fewest instructions; a kernel without any is one tile.
    """
    code, loops = [], []
    for text in sass.splitlines():
        if match := INSTRUCTION.match(text):
            address, operation, rest = int(match[1], 16), match[2], match[3]
            code.append((address, operation))
            target = re.search(r"0x([0-9a-f]+)", rest)
            if operation.startswith("BRA") and target and int(target[1], 16) < address:
                loops.append((int(target[1], 16), address))

    def inside(loop, operation=""):
        return sum(loop[0] <= address <= loop[1] and name.startswith(operation) for address, name in code)

    of_tiles = [loop for loop in loops if inside(loop, "MUFU.EX2")]
    innermost = [a for a in of_tiles if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in of_tiles)]
    body = min(innermost, key=inside) if innermost else (code[0][0], code[-1][0])
    within = [loop for loop in loops if loop != body and body[0] <= loop[0] and loop[1] <= body[1]]
    of_chunks = [loop for loop in within if inside(loop, "HGMMA") or inside(loop, "HMMA")]
    instructions = inside(body) + sum((chunks - 1) * inside(loop) for loop in of_chunks)
    return instructions, inside(body, "MUFU.EX2")


def _sass(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
