"""Every kernel compiles for GPUs that are not here: no spills, within shared memory, wgmma where it should be."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

UNSUPPORTED = ("sm_100", "float32")


def compile_for(target: str, how_much: str, *dtypes: str) -> None:
    """Runs aot.py in a process of its own: this one's kernels may belong to the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("aot.py")
    environment["PYTHONPATH"] = str(Path(__file__).parents[2] / "bench")  # compile_ahead
    run = subprocess.run(
        [sys.executable, script, target, how_much, *dtypes], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_representative_kernels():
    compile_for("sm_90", "some", "bfloat16")


SERIALISED = """
    /*0100*/  HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24 ;
    /*0110*/  WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
    /*0120*/  HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
    /*0130*/  WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
"""


def test_serialised_machine_code_is_recognised():
    waits = pytest.importorskip("compile_ahead").waits_for_each_wgmma
    assert waits(SERIALISED)
    assert not waits(SERIALISED.replace("WARPGROUP.DEPBAR.LE gsb0, 0x0", "NOP", 1))
    assert not waits("/*0100*/  HMMA.16816.F32.BF16 R4, R8, R12, R4 ;")


@pytest.mark.slow
@pytest.mark.parametrize(("target", "dtype"), [("sm_80", "float16"), ("sm_90", "float32"), ("sm_100", "bfloat16")])
def test_representative_kernels_elsewhere(target, dtype):
    compile_for(target, "some", dtype)


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("target", "dtype"),
    # On sm_100 Triton would round fp32 to tf32.
    [pair for pair in product(("sm_80", "sm_90", "sm_100"), ("bfloat16", "float16", "float32")) if pair != UNSUPPORTED],
)
def test_every_shipped_configuration(target, dtype):
    compile_for(target, "all", dtype)
