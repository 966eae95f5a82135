"""What a GPU machine is: its tools and packages; with --rates, the two ceilings of its GPU.

python bench/machine.py [--rates]
"""

import os
import shutil
import subprocess
import sys

import torch

TOOLS = (("nvcc", "--version"), ("nvidia-smi", "-L"), ("ncu", "--version"), ("compute-sanitizer", "--version"))
COPIED = 1 << 30  # bytes
TINY = os.environ.get("BENCH_MACHINE") == "tiny"


def tools() -> None:
    """Print what is installed."""
    for command in TOOLS:
        found = shutil.which(command[0])
        said = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip() if found else ""
        print(f"{command[0]}: {found or 'not on PATH'}", *said.splitlines()[-2:], sep="\n    ")
    print("python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda)
    if torch.cuda.is_available():
        print(torch.cuda.get_device_properties(0))
    elif not TINY:
        sys.exit("error: there is no CUDA device.")


def rates() -> None:
    """Print bytes per second of reading and of copying, and FLOPs per second of a large matmul."""
    from slicegpt_fast.benchmark import machine_rates, now

    device = torch.device("cpu" if TINY else "cuda")
    for dtype in (torch.bfloat16, torch.float16):
        read, matmul = max(machine_rates(device, dtype) for _ in range(1 if TINY else 5))
        print(f"{dtype}: read {read / 1e9:.0f} GB/s, matmul {matmul / 1e12:.1f} TFLOP/s")
    source = torch.randn((1 << 20 if TINY else COPIED) // 4, device=device)
    target, times = torch.empty_like(source), []
    for _ in range(20):
        begin = now(device)
        target.copy_(source)
        times.append(now(device) - begin)
    print(f"copy {2 * source.nbytes / min(times) / 1e9:.0f} GB/s, read and written")


if __name__ == "__main__":
    rates() if "--rates" in sys.argv else tools()
