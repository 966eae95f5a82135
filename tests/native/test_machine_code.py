"""What the CUDA compiler made of csrc/cuda, read from the built extension."""

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

from slicegpt_fast import _C, native

ARCHS = native.build_info().cuda_archs
DECODE = ("norm_linear_decode", "residual_linear_decode")

pytestmark = pytest.mark.skipif(not ARCHS, reason="built without CUDA")


def cuobjdump(*options: str) -> str:
    triton = pytest.importorskip("triton")
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([program, *options, _C.__file__], capture_output=True, text=True, check=True).stdout


@cache
def instructions(arch: str) -> dict[str, list[str]]:
    """Opcodes of every kernel, by its mangled name."""
    functions = re.split(r"^\s+Function : ", cuobjdump("-sass", "-arch", f"sm_{arch}"), flags=re.M)[1:]
    return {
        text.split()[0]: re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", text, re.M)
        for text in functions
    }


def kernels(arch: str, *names: str) -> dict[str, list[str]]:
    return {kernel: code for kernel, code in instructions(arch).items() if any(name in kernel for name in names)}


def test_nothing_spills():
    usage = re.findall(r"Function (\S+?):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", cuobjdump("-res-usage"))
    assert len(usage) >= 16
    assert not [line for line in usage if int(line[2]) or int(line[3])]


@pytest.mark.parametrize("arch", ARCHS)
def test_decode_kernels_stream_in_16_byte_loads_to_the_tensor_cores(arch):
    found = kernels(arch, *DECODE)
    assert len(found) == 2 * 2 * 2 * 2  # op, dtype, rows, alignment
    for kernel, code in found.items():
        assert any(op.startswith("HMMA.16816.F32") for op in code), kernel
        streamed = [i for i, op in enumerate(code) if re.fullmatch(r"LDG\.E\.NA\.\w+\.128", op)]
        aligned = "ELb1E" in kernel
        assert bool(streamed) == aligned
        if (
            aligned
        ):  # nearly all loads of two chunks, or of one for more than 8 rows, are in flight before the first use
            first_use = next(i for i, op in enumerate(code) if i > streamed[0] and op.startswith("HMMA"))
            assert sum(i < first_use for i in streamed) >= (14 if "Li8E" in kernel else 7), kernel


@pytest.mark.skipif("90a" not in ARCHS, reason="built without 90a")
def test_decode_kernels_overlap_the_previous_one_on_hopper():
    for kernel, code in kernels("90a", *DECODE).items():
        released, waited = code.index("PREEXIT"), code.index("ACQBULK")
        assert released < waited, kernel
        before = code[:waited]
        assert "CCTL.E.PF2" in before, kernel
        assert not [op for op in before if op.startswith(("LDG", "STG", "ATOM", "RED"))], kernel


@pytest.mark.skipif("90a" not in ARCHS, reason="built without 90a")
def test_covariance_keeps_the_tensor_cores_busy():
    found = kernels("90a", "partial_tiles")
    assert len(found) == 2
    for kernel, code in found.items():
        wgmma = [op for op in code if op.startswith(("HGMMA", "WARPGROUP.DEPBAR"))]
        assert [op.split(".")[0] for op in wgmma] == ["HGMMA"] * 4 + ["WARPGROUP"], (
            kernel
        )  # one wait for four: not serial
        assert "HGMMA.64x192x16.F32" in wgmma[0], kernel
        assert sum(op.startswith("UTMALDG.3D.MULTICAST") for op in code) == 3, kernel
