"""The CPU kernels at every instruction set of this machine, capped below the one that it would choose."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from slicegpt_fast import _C

TESTS = Path(__file__).parent
FILES = [TESTS / f"test_{op}.py" for op in ("attend", "covariance", "norm_linear", "residual_linear")]
BELOW = _C.cpu_isa_names()[: _C.cpu_isa_names().index(_C.cpu_isa())]


@pytest.mark.parametrize("isa", BELOW)
def test_kernels_are_right_at(isa):
    """The level is read once per process, so each one runs the op tests of the CPU backend in its own."""
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-m",
            "pytest",
            "-q",
            "-k",
            "cpu and (matches_fp64 or views or tile or activations or empty or threads)",
            *map(str, FILES),
        ],
        env=os.environ | {"SLICEGPT_FAST_CPU_ISA": isa},
        cwd=TESTS.parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout)


def test_strong_instructions_stay_in_their_own_files():
    """A function that files of two instruction sets share would be linked once, with the stronger instructions."""
    listing = subprocess.run(["objdump", "-t", _C.__file__], capture_output=True, text=True, check=True).stdout
    shared = set(re.findall(r"^\S+ [ugw!].{5}F \.text\s+\S+\s+(?:\.hidden )?(\S+)$", listing, re.MULTILINE))
    code = subprocess.run(["objdump", "-d", _C.__file__], capture_output=True, text=True, check=True).stdout
    for body in code.split("\n\n"):
        name = re.match(r"\s*[0-9a-f]+ <(.+)>:", body)
        if name and name[1] in shared and not re.search(r"_avx", name[1]):
            assert not re.search(r"%[yz]mm", body), name[1]
