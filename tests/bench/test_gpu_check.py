"""The run on a GPU machine keeps to its budget, and what hangs or fails costs its own step alone."""

import ctypes
import json
import sys
import tarfile

import attributes
import gpu_check
import pytest
from gpu_check import Step, carry_out_all, limit

HANG = "import signal, os; signal.signal(signal.SIGINT, signal.SIG_IGN); os.fork(); print(os.getpid(), flush=True)\n"
HANG += "while True: signal.pause()"
WRITES = "import pathlib, signal, sys\nprint('started', flush=True)\ntry: signal.pause()\n"
WRITES += "except KeyboardInterrupt: pathlib.Path(sys.argv[1]).write_text('{}')"


def step(name, program, *arguments, seconds=600, **options):
    return Step(name, seconds, ("-c", program, *map(str, arguments)), **options)


@pytest.fixture
def check(tmp_path, monkeypatch):
    """check(stages, seconds): the table's lines and the files in the archive, with short waits."""
    for name, value in {"WORK": tmp_path / "work", "GRACE": 0.2, "LEAST": 1, "RESERVE": 0}.items():
        monkeypatch.setattr(gpu_check, name, value)
    (tmp_path / "work").mkdir()

    def run(stages, seconds=600):
        monkeypatch.setattr(gpu_check, "STAGES", stages)
        lines = list(carry_out_all(list(stages), seconds, tmp_path / "results", "heading", dry=False))
        with tarfile.open(tmp_path / "results/results.tgz") as archive:
            files = {entry.name: archive.extractfile(entry).read().decode() for entry in archive}
        assert (tmp_path / "results/table.md").read_text() == files["table.md"]
        return {line["step"]: line["status"] for line in lines}, files

    return run


def is_running(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_step_that_hangs_costs_itself_alone(check):
    stages = {"one": (step("hangs", HANG, seconds=4), step("next", "print('here')")), "two": (step("last", ""),)}
    status, files = check(stages)
    assert status == {"hangs": "killed", "next": "ok", "last": "ok"}
    assert files["next.log"] == "here\n"
    processes = files["hangs.log"].split()
    assert len(processes) == 2  # what it started is killed with it
    assert not any(map(is_running, processes))
    assert "| hangs | killed |" in files["table.md"]


def test_a_step_at_its_limit_may_write_what_it_has(check, tmp_path):
    status, files = check({"one": (step("rows", WRITES, tmp_path / "work/rows.json", seconds=4),)})
    assert status == {"rows": "interrupted"}
    assert json.loads(files["rows.json"]) == {}


def test_a_step_that_fails_is_no_reason_to_stop(check):
    stages = {"one": (step("fails", "raise SystemExit(3)"),), "two": (step("next", ""),)}
    assert check(stages)[0] == {"fails": "exit status 3", "next": "ok"}


def test_nothing_runs_where_the_package_does_not_install(check):
    stages = {"install": (step("install", "raise SystemExit(1)"),), "two": (step("next", ""),)}
    assert check(stages)[0] == {"install": "exit status 1"}


def test_what_does_not_fit_is_shortened_or_left_out(check):
    stages = {"one": (step("long", HANG), step("next", ""))}
    status, _ = check(stages, seconds=4)
    assert status["long"] == "killed, shortened to 4 s"
    assert status["next"].startswith("left out: ")


@pytest.mark.parametrize(
    ("wanted", "left", "expected"), [(100, 500, 100), (100, 60, 45), (100, 29, 0), (10, 26, 10), (10, 24, 0)]
)
def test_limits(wanted, left, expected):
    assert limit(step("", "", seconds=wanted), left) == expected


def test_a_tool_that_is_not_there(check):
    status, _ = check({"one": (step("tool", "", tool=("no-such-tool",)), step("next", ""))})
    assert status == {"tool": "left out: no-such-tool is not on PATH", "next": "ok"}


def test_an_unknown_stage(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--stages", "smoke,smok"])
    with pytest.raises(SystemExit):
        gpu_check.main()
    assert "no stage is called smok; there are install, smoke, " in capsys.readouterr().err


def test_every_file_of_a_step_is_there():
    for stage in gpu_check.STAGES.values():
        for each in stage:
            files = [name for name in each.arguments if name.startswith(("bench/", "tests/"))]
            assert all((gpu_check.ROOT / name).exists() for name in files), each.name


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_dry_run(tmp_path, monkeypatch):
    """All stages on the CPU: what they import, what their tools are asked, what becomes of what they found."""
    monkeypatch.setattr(gpu_check, "LEAST", 0)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # pytest-benchmark measures nothing in a worker's children
    arguments = ["gpu_check.py", "--dry-run", "--seconds", "1700", "--results", str(tmp_path), "--commit", "abc"]
    monkeypatch.setattr(sys, "argv", arguments)
    status = gpu_check.main()
    table = (tmp_path / "table.md").read_text()
    assert status == 0, table
    assert table.startswith("Commit abc, ")
    assert table.count("| ok |") == sum(map(len, gpu_check.STAGES.values()))
    with tarfile.open(tmp_path / "results.tgz") as archive:
        names = archive.getnames()
    assert {"smoke.log", "tuned.json", "ops-block.rows.json", "end_to_end-triton.rows.json"} <= set(names)
    assert any(name.startswith("report/") and name.endswith(".md") for name in names)


def test_launches_are_laid_out_as_the_driver_has_them():
    assert (ctypes.sizeof(attributes.Attribute), ctypes.sizeof(attributes.Launch)) == (72, 56)
    assert (attributes.Launch.shared.offset, attributes.Launch.stream.offset) == (24, 32)
    assert attributes.Attribute.dimension.offset == 8
