"""What the driver says of every CUDA kernel of the built extension: registers, spills, versions, clusters at a time.

    python bench/attributes.py

A kernel whose PTX version is below 9.0 would not be launched in clusters; 0 clusters at a time mean that none fits.
"""

import ctypes
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

from compile_ahead import cuobjdump
from markdown_table import table

from slicegpt_fast import _C

ATTRIBUTES = {"registers": 4, "local bytes": 3, "static shared bytes": 1, "PTX version": 5, "binary version": 6}
MOST_DYNAMIC_SHARED = 8  # attribute that allows a block so many bytes
CLUSTER_DIMENSION = 4  # attribute of a launch
CLUSTERED = ("_prefill", "partial_tiles")  # names of the kernels that run in pairs of blocks
THREADS, SHARED, RANKS = 384, 230512, 2  # of each of these blocks; blocks of a cluster


class Attribute(ctypes.Structure):
    """CUlaunchAttribute, with a cluster's dimensions."""

    _fields_ = (
        ("id", ctypes.c_int),
        ("_", ctypes.c_int),
        ("dimension", ctypes.c_uint * 3),
        ("_rest", ctypes.c_byte * 52),
    )


class Launch(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("count", ctypes.c_uint),
    )


class Driver:
    """The functions of libcuda, on the first GPU; each raises where it fails."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)

    def call(self, name: str, *arguments: object) -> None:
        status = getattr(self.library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} returned {status}")

    def functions(self, file: Path) -> Iterator[tuple[str, ctypes.c_void_p]]:
        """Return the names and handles of the kernels in a cubin."""
        module, count = ctypes.c_void_p(), ctypes.c_uint()
        self.call("cuModuleLoad", ctypes.byref(module), str(file).encode())
        self.call("cuModuleGetFunctionCount", ctypes.byref(count), module)
        handles = (ctypes.c_void_p * count.value)()
        self.call("cuModuleEnumerateFunctions", handles, count, module)
        for handle in map(ctypes.c_void_p, handles):
            name = ctypes.c_char_p()
            self.call("cuFuncGetName", ctypes.byref(name), handle)
            yield (name.value or b"").decode(), handle

    def attribute(self, function: ctypes.c_void_p, which: int) -> int:
        value = ctypes.c_int()
        self.call("cuFuncGetAttribute", ctypes.byref(value), which, function)
        return value.value

    def clusters(self, function: ctypes.c_void_p) -> int:
        """Return how many clusters of a prefill kernel run at a time."""
        self.call("cuFuncSetAttribute", function, MOST_DYNAMIC_SHARED, SHARED)
        cluster = Attribute(CLUSTER_DIMENSION, 0, (RANKS, 1, 1))
        launch = Launch((RANKS, 1, 1), (THREADS, 1, 1), SHARED, None, ctypes.pointer(cluster), 1)
        count = ctypes.c_int()
        self.call("cuOccupancyMaxActiveClusters", ctypes.byref(count), function, ctypes.byref(launch))
        return count.value


def main() -> int:
    tiny = os.environ.get("BENCH_MACHINE") == "tiny"
    driver = None if tiny else Driver()
    rows = []
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        cuobjdump(_C.__file__, "--extract-elf", "sm_90a")
        files = sorted(Path(folder).glob("*.cubin"))
        for name, function in (pair for file in files if driver for pair in driver.functions(file)):
            row: dict[str, str | int] = {"kernel": name}
            row |= {label: driver.attribute(function, which) for label, which in ATTRIBUTES.items()}
            if any(part in name for part in CLUSTERED):
                row["clusters at a time"] = driver.clusters(function)
            rows.append(row)
    print(f"{len(files)} files", table(rows) if rows else "", sep="\n\n")
    return int(not files or not (rows or tiny))


if __name__ == "__main__":
    sys.exit(main())
