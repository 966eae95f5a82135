"""What the CUDA compiler made of csrc/cuda, read from the built extension."""

import re
from functools import cache, partial
from itertools import pairwise

import pytest

from slicegpt_fast import _C
from slicegpt_fast.kernels import native

ARCHS = native.build_info().cuda_archs
DECODE = ("norm_linear_decode", "residual_linear_decode")
CLUSTER = ("UCGABAR_ARV", "UCGABAR_WAIT", "LD.E.128")  # arriving, waiting, and reading shared memory of another block

pytestmark = pytest.mark.skipif(not ARCHS, reason="built without CUDA")
compile_ahead = pytest.importorskip("compile_ahead")
cuobjdump = partial(compile_ahead.cuobjdump, _C.__file__)


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
    assert len(found) == 2 * 2 * 2  # op, dtype, rows
    for kernel, code in found.items():
        # Nearly all loads of two chunks, or of one for more than 8 rows, are in flight before the first use.
        streamed = [i for i, op in enumerate(code) if re.fullmatch(r"LDG\.E\.NA\.\w+\.128", op)]
        first_use = next(i for i, op in enumerate(code) if i > streamed[0] and op.startswith("HMMA.16816.F32"))
        assert sum(i < first_use for i in streamed) >= (14 if "Li8E" in kernel else 7), kernel


@pytest.mark.parametrize("arch", ARCHS)
def test_decode_kernels_add_up_a_tile_in_a_cluster_on_hopper(arch):
    for kernel, code in kernels(arch, *DECODE).items():
        across_blocks = [op for op in code if op.startswith(("ATOM", "RED.", "LDG.E.128.STRONG", "STG.E.128"))]
        arrivals, waits, peers = ([i for i, op in enumerate(code) if op == name] for name in CLUSTER)
        squares = int("residual" in kernel)  # whose sums over all tiles take one counter
        if int(arch.rstrip("af")) < 90:
            assert not arrivals + waits + peers, kernel
            assert sum(op.startswith("ATOM") for op in across_blocks) == 1 + squares, kernel
            continue
        assert len(across_blocks) == squares, kernel
        assert len(peers) == 8 * (1 if "Li8E" in kernel else 2), kernel  # each rank's share, in quads per thread
        stored, read, left = arrivals
        # A release: what the block has stored is to be read. Nothing is stored between the two.
        release = max(i for i, op in enumerate(code[:stored]) if op.startswith("MEMBAR"))
        assert not [op for op in code[release:stored] if op.startswith(("ST", "HMMA"))], kernel
        assert stored < waits[0] < peers[0], kernel
        # All threads have used what they have read before the other blocks may end.
        assert "BAR.SYNC.DEFER_BLOCKING" in code[peers[-1] : read], kernel
        assert left < waits[1] < len(code) - code[::-1].index("EXIT"), kernel


@pytest.mark.skipif("90a" not in ARCHS, reason="built without 90a")
def test_decode_kernels_overlap_the_previous_one_on_hopper():
    for kernel, code in kernels("90a", *DECODE).items():
        released, waited = code.index("PREEXIT"), code.index("ACQBULK")
        assert released < waited, kernel
        before = code[:waited]
        assert "CCTL.E.PF2" in before, kernel
        assert not [op for op in before if op.startswith(("LDG", "STG", "ATOM", "RED"))], kernel


@pytest.mark.parametrize("arch", ARCHS)
def test_attend_streams_the_cache_in_16_byte_loads_to_the_tensor_cores(arch):
    found = kernels(arch, "attend_decode")
    assert len(found) == 2 * 4  # dtype, size of a head and one for rows that are no vectors
    for kernel, code in found.items():
        size, vectors = re.search(r"ELi(\d+)ELb([01])E", kernel).groups()
        streamed = [i for i, op in enumerate(code) if re.fullmatch(r"LDG\.E\.NA\.\w+\.128", op)]
        if vectors == "0":
            assert not streamed, kernel
            continue
        # 16 positions of keys and values; both of the first step are on their way before anything is multiplied.
        ahead = int(size) < 256
        assert len(streamed) == (1 + ahead) * 2 * 16 * int(size) * 2 // (32 * 16), kernel
        first_use = next(i for i, op in enumerate(code) if op.startswith("HMMA.16816.F32"))
        assert sum(i < first_use for i in streamed) >= len(streamed) // (2 if ahead else 4), kernel
        assert sum(op.startswith("ATOM") for op in code) == 1, kernel


@pytest.mark.skipif("90a" not in ARCHS, reason="built without 90a")
def test_attend_overlaps_the_previous_kernel_on_hopper():
    for kernel, code in kernels("90a", "attend_decode").items():
        waited = code.index("ACQBULK")
        assert code.index("PREEXIT") < waited, kernel
        assert not [op for op in code[:waited] if op.startswith(("LDG", "STG", "ATOM", "RED"))], kernel


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


@pytest.mark.skipif("90a" not in ARCHS, reason="built without 90a")
def test_covariance_adds_its_splits_in_a_few_instructions_each():
    found = kernels("90a", "reduce_mirror")
    assert len(found) == 2
    for kernel, code in found.items():
        widened = [i for i, op in enumerate(code) if op.startswith("F2F.F64.F32")]
        close = "".join("c" if after - before <= 8 else " " for before, after in pairwise(widened))
        assert max(map(len, close.split())) >= 12, kernel


@pytest.mark.skipif("90a" not in ARCHS, reason="built without 90a")
def test_prefill_keeps_the_tensor_cores_busy():
    found = kernels("90a", "norm_linear_prefill", "residual_linear_prefill", "residual_linear_partial")
    assert len(found) == 2 * 7 * (5 + 1 + 1)  # dtype, width; activation, whole, split
    for kernel, code in found.items():
        width = int(re.search(r"_p\w+ILi(\d+)E", kernel)[1])
        two_pairs, whole = "residual" in kernel, "_prefillILi" in kernel
        assert code.index("ACQBULK") < next(i for i, op in enumerate(code) if op.startswith(("UTMALDG", "LDG")))
        assert sum(op.startswith("UTMALDG.3D.MULTICAST") for op in code) >= 1 + two_pairs * -(-width // 64), kernel

        first, *_, last = (i for i, op in enumerate(code) if op.startswith("HGMMA"))
        assert code[first].startswith(f"HGMMA.64x{width}x16.F32"), kernel
        wgmma = "".join(op[0] for op in code if op.startswith(("HGMMA", "WARPGROUP.DEPBAR")))
        assert set(filter(None, wgmma.split("W"))) == {"HHHH"}, kernel  # one wait for four: not serial

        # Wide stores of all a thread has, and nothing that waits for memory among the multiplications.
        assert code.count("STG.E.128" if whole else "STG.E.64") == (2 * -(-width // 32) if whole else width // 4), (
            kernel
        )
        assert not [op for op in code[first:last] if op.startswith(("MEMBAR", "CCTL", "STG", "LDG"))], kernel


# Bytes of a tile of 256 columns: what runs at its end should stay in the instruction cache of 128 KB.
LARGEST = {"_prefillILi256E": 80 << 10, "_partialILi256E": 24 << 10}


@pytest.mark.skipif("90a" not in ARCHS, reason="built without 90a")
def test_prefill_kernels_are_short():
    for name, most in LARGEST.items():
        for kernel, code in kernels("90a", name).items():
            assert 16 * len(code) <= most, kernel


@pytest.mark.skipif("90a" not in ARCHS, reason="built without 90a")
def test_no_barrier_of_a_cluster_waits_for_memory():
    for kernel, code in kernels("90a", "partial_tiles", "_prefill").items():
        joins = sum(op.startswith("UCGABAR_ARV") for op in code)
        assert joins == 2, kernel
        assert code.count("MEMBAR.ALL.GPU") == joins, kernel
        assert code.count("CCTL.IVALL") == joins, kernel
