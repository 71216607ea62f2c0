"""Compile the Triton kernels for GPUs that are not there, and read what the machine code needs and its inner loop does.

`make launch-table` prints a line of JSON for every shipped launch and architecture, and records in `inner_loops.jsonl`
those that the tests hold.
"""

import importlib
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ccl_fast.kernels import contrast_rows, unit_rows
from ccl_fast.kernels import streaming_logsumexp as kernels
from ccl_fast.kernels.launch import ARCHITECTURES, TABLE, Launch, launch_on

# The instruction that multiplies matrices in each generation's machine code.
TENSOR_CORE = {90: "HGMMA", 100: r"UTC\w*MMA"}  # all others: HMMA
# What a multiprocessor has for all of its blocks; a block may have all of the shared memory but 1 KiB.
SHARED_OF_PROCESSOR = {80: 167_936, 86: 102_400, 89: 102_400, 90: 233_472, 100: 233_472, 120: 102_400}
REGISTERS_OF_PROCESSOR, WARPS_OF_PROCESSOR = 65_536, {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
RESERVED_BYTES = 1024  # of shared memory, by every block
ELEMENTS = {"bf16": 2, "fp32": 4}
# What the tests hold of every launch: a higher count, or fewer blocks, is a slower kernel.
HELD = ("instructions", "exponentials", "shuffles", "blocks_per_multiprocessor", "copies_in_flight")
RECORD = Path(__file__).parent / "inner_loops.jsonl"
# Of a contrast's rows: pointers to integers, and what is None without centres.
OF_ROWS = ("ids_ptr", "group_ptr", "others_ptr")
WITHOUT_CENTERS = dict.fromkeys(
    ("centers_ptr", "ids_ptr", "center_scale_ptr", "to_centers_ptr", "from_centers_ptr", "dots_ptr")
)
# Kernels without products, which are in no launch table: module, name, constants, pointers to int32.
OTHERS = (
    (kernels.__name__, "prepare_anchors", {"BLOCK": 256}, ("bounded_ptr",)),
    (kernels.__name__, "prepare_anchors", {"BLOCK": 256, "bounded_ptr": None}, ()),
    (kernels.__name__, "combine_parts", {"BLOCK": 256}, ("bounded_ptr",)),
    (kernels.__name__, "combine_parts", {"BLOCK": 256, "bounded_ptr": None, "sums_ptr": None}, ()),
    (unit_rows.__name__, "unit_rows", {"BLOCK": 128, "LARGEST_INVERSE": 2.0**41}, ()),
    (unit_rows.__name__, "unit_rows", {"BLOCK": 4096, "LARGEST_INVERSE": 2.0**41}, ()),
    (unit_rows.__name__, "unit_rows_gradient", {"BLOCK": 128}, ()),
    (unit_rows.__name__, "unit_rows_gradient", {"BLOCK": 4096}, ()),
    (contrast_rows.__name__, "row_losses", {"BLOCK": 128}, OF_ROWS),
    (contrast_rows.__name__, "row_losses", {"BLOCK": 4096} | WITHOUT_CENTERS, OF_ROWS),
    (contrast_rows.__name__, "row_gradients", {"BLOCK": 128}, OF_ROWS),
    (contrast_rows.__name__, "row_gradients", {"BLOCK": 4096} | WITHOUT_CENTERS, OF_ROWS),
    ("benchmarks.harvest.ceiling_kernels", "read", {"BLOCK": 4096}, ("x_ptr", "out_ptr")),
    ("benchmarks.harvest.ceiling_kernels", "exponentials", {"BLOCK": 1024}, ()),
)


@dataclass
class Report:
    """Of the compiled kernel; the counts are of its inner loop, by element of a tile."""

    registers: int
    spill_instructions: int
    shared_bytes: int
    blocks_per_multiprocessor: int
    tensor_core_instructions: int
    narrowest_product: int | None  # columns of the narrowest warpgroup product, on sm_90
    copies_in_flight: int | None  # groups of asynchronous copies that the loop's wait leaves outstanding
    instructions: float
    exponentials: float
    shuffles: float


def compile_kernel(kernel: str, element: str, entry: Launch, d: int, arch: int, precision="tf32", **variant):
    """`variant` overrides constexprs; ids=True gives cluster ids, bias=True a key bias, skip=True runs of ids."""
    fn = getattr(kernels, kernel)
    ids, bias, flag, skip = (variant.pop(name, False) for name in ("ids", "bias", "flag", "skip"))
    constants = {
        "D": d,
        "BLOCK_D": entry.block_d,
        "BLOCK_M": entry.block_m,
        "BLOCK_N": entry.block_n,
        "PRECISION": precision,
        "IS_SELF": True,
        "WANT_SAME": ids and not skip,
        "WANT_OTHER": True,
        "ROW_ANCHORS": True,
        "COL_ANCHORS": True,
        "RUN_IF_BOUNDED": False,
    } | variant
    absent = {} if bias else {"bias_ptr": None}
    # The gradient of the scale is asked of the pass over the queries, that of the bias of the one over the keys.
    absent |= dict.fromkeys(["bias_grad_ptr"] if constants["ROW_ANCHORS"] else ["scale_grad_ptr"])
    if not ids:
        absent |= dict.fromkeys(("q_ids_ptr", "k_ids_ptr", "ids_ptr", "a_ids_ptr", "b_ids_ptr"))
    if not flag and kernel != "forward_triangle":
        absent["bounded_ptr"] = None
    if not skip:
        absent["skip_ptr"] = None
    signature, attributes, constexprs = {}, {}, {}
    for i, name in enumerate(fn.arg_names):
        if name in constants or name in absent:
            signature[name], constexprs[name] = "constexpr", constants.get(name)
        elif name.endswith("ids_ptr") or name in ("bounded_ptr", "skip_ptr"):
            signature[name] = "*i32"
        elif name in ("q_ptr", "k_ptr", "a_ptr", "b_ptr", "z_ptr", "out_ptr"):
            signature[name] = f"*{element}"
        else:
            signature[name] = "*fp32" if name.endswith("_ptr") else "i32"
        # Pointers are aligned, and a row is a multiple of 16 elements (of weights of 8); block counts and other offsets
        # are anything.
        aligned = name.endswith(("_ptr", "_row")) and (kernel, name) != ("backward_weights", "out_row")
        if aligned and signature[name] != "constexpr":
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn, signature, constexprs, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=entry.options)


def compile_other(arch: int, module: str, kernel: str, constants: dict, integers: tuple) -> int:
    """Bytes of the machine code of one of `OTHERS`."""
    fn, signature, constexprs = getattr(importlib.import_module(module), kernel), {}, {}
    for name in fn.arg_names:
        if name in constants:
            signature[name], constexprs[name] = "constexpr", constants[name]
        else:
            pointer = "*i32" if name in integers else "*fp32"
            signature[name] = pointer if name.endswith("_ptr") else "fp32" if name.endswith("_weight") else "i32"
    compiled = triton.compile(ASTSource(fn, signature, constexprs), target=GPUTarget("cuda", arch, 32))
    return len(compiled.asm["cubin"])


def read(compiled, entry: Launch, d: int, arch: int) -> Report:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def run(option):
            done = subprocess.run([tools / "cuobjdump", option, file.name], capture_output=True, text=True, check=True)
            return done.stdout

        usage, code = run("-res-usage"), run("-sass")
    registers, shared = int(re.search(r"REG:(\d+)", usage).group(1)), compiled.metadata.shared
    loop, chunk = inner_loop(code)
    chunks = -(-d // entry.block_d)
    elements = entry.block_m * entry.block_n / (32 * entry.num_warps)

    def count(pattern):
        inside = sum(bool(re.search(pattern, line)) for line in chunk)
        outside = sum(bool(re.search(pattern, line)) for line in loop) - inside
        return round((outside + inside * chunks) / elements, 2)

    waits = [int(n, 0) for line in chunk or loop for n in re.findall(r"DEPBAR\.LE SB0, (\w+)", line)]
    widths = [int(n) for n in re.findall(r"HGMMA\.64x(\d+)x", code)]
    return Report(
        registers=registers,
        spill_instructions=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared_bytes=shared,
        blocks_per_multiprocessor=min(
            REGISTERS_OF_PROCESSOR // (-(-registers // 8) * 8 * 32 * entry.num_warps),
            SHARED_OF_PROCESSOR[arch] // (shared + RESERVED_BYTES),
            WARPS_OF_PROCESSOR[arch] // entry.num_warps,
        ),
        tensor_core_instructions=len(re.findall(rf"\b{TENSOR_CORE.get(arch, 'HMMA')}\b", code)),
        narrowest_product=min(widths, default=None),
        copies_in_flight=min(waits, default=None),
        instructions=count("."),
        exponentials=count(r"MUFU\.EX2"),
        shuffles=count(r"\bSHFL\b"),
    )


def inner_loop(code: str) -> tuple[list[str], list[str]]:
    """The instructions of the shortest loop with exponentials, and of the loop over chunks of D within it (empty
    without one); of the whole kernel where the exponentials are in no loop."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.M)
    at, lines = [int(address, 16) for address, _ in found], [line for _, line in found]
    loops = []
    for i, line in enumerate(lines):
        jump = re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", line)
        if jump and int(jump[1], 16) < at[i]:
            loops.append((at.index(int(jump[1], 16)), i + 1))
    loops = [(start, stop) for start, stop in loops if any("MMA" in line for line in lines[start:stop])]
    outer = [x for x in loops if any("MUFU.EX2" in line for line in lines[x[0] : x[1]])]
    start, stop = min(outer, key=lambda x: x[1] - x[0], default=(0, len(lines)))
    inner = [x for x in loops if start <= x[0] and x[1] <= stop and x != (start, stop)]
    low, high = min(inner, key=lambda x: x[1] - x[0], default=(0, 0))
    return lines[start:stop], lines[low:high]


def variants(kernel: str, ids: bool) -> list[dict]:
    """The ways a kernel is launched, by what changes its machine code; that of the largest problems first."""
    rectangular = {"IS_SELF": False, "bias": True}
    skipping = [{"skip": True}] if ids else []
    if kernel == "backward_rows":
        found = [{"RUN_IF_BOUNDED": True, "flag": True}, {"flag": True}]
        found += [rectangular | {"COL_ANCHORS": False}, rectangular | {"ROW_ANCHORS": False}]
        found += [{"IS_SELF": False, "RUN_IF_BOUNDED": bounded, "flag": True} for bounded in (False, True)]
    elif kernel == "backward_weights":
        found = [{}, {"IS_SELF": False}, rectangular | {"COL_ANCHORS": False}]
    elif kernel == "forward_triangle":
        found = [{}]
    else:
        found = [{}, rectangular]
    return [variant | {"ids": ids} for variant in found] + [found[0] | {"ids": ids} | x for x in skipping]


def shipped() -> list[tuple[str, str, bool, int, str]]:
    """Each launch of the table: kernel, element, whether there are ids, a D that it serves, precision of products."""
    return [
        (kernel, element, ids, min(entry.limit, 1024), precision)
        for (kernel, size, ids), entries in TABLE.items()
        for element in ELEMENTS
        if ELEMENTS[element] == size
        for entry in entries
        for precision in (("tf32",) if size == 2 else ("tf32x3", "tf32"))
    ]


def planned(entry: tuple, quick: bool) -> list[tuple[int, int]]:
    """Architectures, and numbers of the variants, to compile. Quick: the first variant for every architecture (of the
    backward the first two: within and beyond the bound), the others for sm_90."""
    kernel, _, ids, *_ = entry
    found = []
    for arch in ARCHITECTURES:
        count = len(variants(kernel, ids))
        if quick and arch != 90:
            count = 2 if kernel == "backward_rows" else 1
        found += [(arch, number) for number in range(count)]
    return found


def audit(kernel: str, element: str, ids: bool, d: int, precision: str, arch: int, number: int) -> dict:
    """A line of the table."""
    chosen, variant = launch_on(arch, kernel, ELEMENTS[element], d, ids), variants(kernel, ids)[number]
    report = read(compile_kernel(kernel, element, chosen, d, arch, precision, **variant), chosen, d, arch)
    line = {"kernel": kernel, "dtype": element, "D": d, "precision": precision, "arch": arch, "launch": list(chosen)}
    line |= {"main": number == 0, "variant": variant, "shared_limit": SHARED_OF_PROCESSOR[arch] - RESERVED_BYTES}
    return line | asdict(report)


def ptx(kernel: str) -> str:
    """Of one of the kernel's launches."""
    return compile_kernel(kernel, "bf16", launch_on(90, kernel, 2, 128, False), 128, 90, flag=True).asm["ptx"]


def recorded() -> dict[tuple, dict]:
    """The lines of the table as they were when it was last recorded, by entry, architecture and number of a variant."""
    lines = map(json.loads, RECORD.read_text().splitlines())
    return {(*line.pop("entry"), line.pop("arch"), line.pop("number")): line for line in lines}


def main() -> None:
    """Print a line for each launch, variant and architecture, and record what the tests hold."""
    lines = []
    for entry in shipped():
        held = planned(entry, quick=True)
        for arch, number in planned(entry, quick=False):
            report = audit(*entry, arch, number)
            print(json.dumps(report), flush=True)
            if (arch, number) in held:
                line = {"entry": entry, "arch": arch, "number": number} | {name: report[name] for name in HELD}
                lines.append(json.dumps(line))
    RECORD.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
