"""The headers of csrc/cuda that device and host share: a C++ program beside this file is the unit test of each."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CXX = os.environ.get("CXX") or shutil.which("c++")


@pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("source", sorted(HERE.glob("*.cpp")), ids=lambda source: source.stem)
def test_index_arithmetic(source, tmp_path):
    program = tmp_path / source.stem
    flags = ["-std=c++17", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wall", "-Werror"]
    subprocess.run([CXX, *flags, f"-I{HERE.parent.parent / 'csrc'}", source, "-o", program], check=True)
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
