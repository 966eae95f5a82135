"""The static table holds while the compilers make the same of the kernels, and says which rows do not."""

import json
import sys

import pytest

static = pytest.importorskip("static", reason="Triton is not installed")


def part(compiler: str = "triton 3", **registers: int) -> dict:
    return {
        "compiler": compiler,
        "kernels": [{"kernel": name, "registers": count} for name, count in registers.items()],
    }


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """check(recorded, now): what --check prints, and its exit status."""

    def run(recorded: dict, now: dict) -> tuple[list[str], int]:
        (tmp_path / "static.json").write_text(json.dumps(recorded))
        monkeypatch.setattr(sys, "argv", ["static.py", "--check", "--out", str(tmp_path)])
        monkeypatch.setattr(static, "measure", lambda _: now)
        status = static.main()
        return capsys.readouterr().out.splitlines(), status

    return run


def test_what_holds(check):
    same = {"triton": part(a=40, b=50)}
    assert check(same, same) == (["compared: triton 3"], 0)


def test_rows_that_changed_are_shown(check):
    lines, status = check({"triton": part(a=40, b=50, c=60)}, {"triton": part(a=40, b=255, d=70)})
    assert status == 1
    assert lines[0] == " | kernel | registers |"
    assert lines[1:5] == ["-| b | 50 |", "-| c | 60 |", "+| b | 255 |", "+| d | 70 |"]
    assert lines[-1].startswith("error: ")


def test_another_compiler_is_passed_over(check):
    recorded = {"triton": part(a=40), "cuda": part("nvcc 13", k=32)}
    now = {"triton": part("triton 4", a=50), "cuda": part("nvcc 13", k=32)}
    assert check(recorded, now) == (["compared: nvcc 13"], 0)
