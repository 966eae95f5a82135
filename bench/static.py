"""What the compilers made of every kernel, for GPUs that need not be here: one JSON and one table.

    python bench/static.py [--check] [--out docs/benchmarks]

The Triton kernels are those of a sliced Llama-2-7B block in bf16 (d = 2872, M = 16 and 4096) with the tiles that a call
would choose; the CUDA kernels are all of csrc/cuda, read from the built extension. --check writes nothing, prints the
rows of the table that the same compiler makes otherwise now, and fails if there are any; another compiler's part is
passed over.
"""

import argparse
import difflib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from compile_ahead import GPUS, compile_calls, cuobjdump, dump, resources
from markdown_table import table

from slicegpt_fast import _C
from slicegpt_fast.kernels.native import build_info
from slicegpt_fast.ops.dispatch import OPS, Request
from slicegpt_fast.ops.tuning import Shape

D, ATTENTION, GATE_UP = 2872, 4096, 2 * 11008
REGISTERS, WARPS, BLOCKS = 65536, 64, 32  # of an SM
SHARED_MEMORY = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}  # of an SM; each block takes 1 KiB more
# Machine instructions counted, by the name that PTX has for them. An instruction counts in the first row that it fits.
INSTRUCTIONS = {
    "wgmma": r"[HIQ]GMMA",
    "tcgen05": r"UTC.*MMA",
    "mma": r"[HID]MMA",
    "TMA load": "UTMALDG",
    "cp.async": "LDGSTS",
    "ld.global.v4": r"LDG.*\.128",
    "ld.global": "LDG",
    "st.global.v4": r"STG.*\.128",
    "st.global": "STG",
}

HEADER = """# The kernels as compiled

Spilled: bytes per thread. Shared: bytes per program. Blocks and warps per SM: what registers, shared memory and warps
let one SM hold. The columns after them count instructions in the machine code, not how often they run.

`python bench/static.py` writes this table, `python bench/static.py --check` says whether it still holds.
"""


def shapes() -> dict[str, Shape]:
    """Return the calls of the table by name."""
    found = {
        "covariance_": Shape("covariance_", 65536, D, D),
        "covariance_, row scale": Shape("covariance_", 65536, D, D, "row scale"),
    }
    for M in (16, 4096):
        found |= {
            f"QKV, M={M}": Shape("norm_linear", M, 3 * ATTENTION, D),
            f"gate/up, M={M}": Shape("norm_linear", M, GATE_UP, D, "silu_gate"),
            f"out, dense shortcut, M={M}": Shape("residual_linear", M, D, ATTENTION + D, "dense"),
            f"out, residual added, M={M}": Shape("residual_linear", M, D, ATTENTION, "add"),
        }
    return found | {f"attention, T={M}": Shape("attend", M, ATTENTION, 4096) for M in (1, 16)}


def call(shape: Shape) -> Callable[[], Any]:
    """Return a call of the op's Triton kernel, on operands that take no memory."""
    op, widths = OPS[shape.op], (shape.m, shape.n, shape.k)
    request = Request(shape.op, torch.device("meta"), torch.bfloat16, op.regime(shape.m), widths, shape.epilogue)
    return partial(op.backends["triton"].run, *op.operands(request))


def instructions(sass: str) -> dict[str, int]:
    """How often each of INSTRUCTIONS occurs in one function's listing."""
    counts = dict.fromkeys(INSTRUCTIONS, 0)
    for opcode in re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass):
        name = next((name for name, pattern in INSTRUCTIONS.items() if re.match(pattern, opcode)), None)
        if name is not None:
            counts[name] += 1
    return counts


def blocks_per_sm(target: str, registers: int, shared_memory: int, warps: int) -> int:
    """Programs that an SM holds at once, by registers (given out to warps in units of 256), shared memory and warps."""
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256 * warps)
    return min(BLOCKS, WARPS // warps, by_registers, SHARED_MEMORY[target] // (shared_memory + 1024))


def triton_kernels() -> list[dict[str, Any]]:
    os.environ["XDG_CACHE_HOME"] = os.devnull  # no tiles that somebody tuned on this machine
    rows = []
    for target, gpu in GPUS.items():
        for name, shape in shapes().items():
            for kernel in compile_calls(gpu, call(shape)):
                counts = instructions(dump(kernel.cubin, "-sass"))
                blocks = blocks_per_sm(target, kernel.registers, kernel.shared_memory, kernel.warps)
                row = {"kernel": kernel.name, "call": name, "target": target, "registers": kernel.registers}
                row |= {"spilled": kernel.spilled_bytes, "shared": kernel.shared_memory, "warps": kernel.warps}
                rows.append(row | {"blocks/SM": blocks, "warps/SM": blocks * kernel.warps} | counts)
    return rows


def cuda_kernels() -> list[dict[str, Any]]:
    rows = []
    listings = re.split(r"\barch = ", cuobjdump(_C.__file__, "-sass"))[1:]
    usages = re.split(r"\barch = ", cuobjdump(_C.__file__, "-res-usage"))[1:]
    for usage, listing in zip(usages, listings, strict=True):
        sass = dict(re.findall(r"Function : (\S+)(.*?)(?=Function : |\Z)", listing, re.DOTALL))
        for mangled, (registers, spilled, shared) in resources(usage).items():
            full = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
            name = re.sub(r"^void |\(.*", "", full.replace("(anonymous namespace)::", ""))
            row = {"kernel": name, "target": listing.split()[0], "registers": registers}
            rows.append(row | {"spilled": spilled, "shared": shared} | instructions(sass[mangled]))
    return sorted(rows, key=lambda row: (row["kernel"], row["target"]))


def measure(recorded: dict[str, Any]) -> dict[str, Any]:
    """Compiler and kernels of both parts; an extension that was built without CUDA keeps what is recorded."""
    parts = {"triton": {"compiler": f"triton {triton.__version__}", "kernels": triton_kernels()}}
    build = build_info()
    if build.cuda_compiler:
        compiler = f"{build.cuda_compiler}, {';'.join(build.cuda_archs)}"
        parts["cuda"] = {"compiler": compiler, "kernels": cuda_kernels()}
    elif "cuda" in recorded:
        parts["cuda"] = recorded["cuda"]
    return parts


def changes(recorded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The rows of the table that the compiler makes otherwise now, below the table's head; [] if there is none."""
    head, _, *before = table(recorded["kernels"]).splitlines()
    _, _, *after = table(now["kernels"]).splitlines()
    _, _, *differences = [*difflib.unified_diff(before, after, lineterm="", n=0)] or ["", ""]
    rows = [line for line in differences if not line.startswith("@@")]
    return [f" {head}", *rows] if rows else []


def main() -> int:
    parser = argparse.ArgumentParser(description="Registers, shared memory, spills and instructions of every kernel.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the JSON says something else")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder of the JSON and the table")
    arguments = parser.parse_args()
    path = arguments.out / "static.json"
    recorded = json.loads(path.read_text()) if path.is_file() else {}
    parts = measure(recorded)
    if arguments.check:
        same = {name: part for name, part in recorded.items() if part["compiler"] == parts[name]["compiler"]}
        changed = [line for name, part in same.items() for line in changes(part, parts[name])]
        print(*changed, f"compared: {', '.join(part['compiler'] for part in same.values()) or 'nothing'}", sep="\n")
        if changed:
            print(
                "error: the kernels are no longer compiled as committed; `python bench/static.py` writes the new table."
            )
        return int(bool(changed))
    tables = [f"## {part['compiler']}\n\n{table(part['kernels'])}\n" for part in parts.values()]
    path.write_text(json.dumps(parts, indent=1) + "\n")
    path.with_suffix(".md").write_text("\n".join((HEADER, *tables)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
