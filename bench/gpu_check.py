"""On a machine with a GPU, its packages and no network: installs, checks, tunes and times the kernels, within a budget.

    python bench/gpu_check.py [--stages "smoke ops"] [--seconds 560] [--results FOLDER] [--commit ID] [--dry-run]

Stages run in the order given, `install` always first, each step in a process group of its own and within a limit; what
does not fit into what is left of the budget is shortened or left out, and the table says so. A step that is still
there at its limit is interrupted, so that a benchmark writes the rows it has, and killed GRACE seconds later, so that a
kernel that hangs costs its step alone. After each stage FOLDER holds `table.md`, a line per step, and `results.tgz`:
logs, rows, tables, figures and what was tuned. Only a failed `install` ends the run. What is built and tuned serves
later runs here. One way to spend three commands: "smoke ceilings ops tests", "tune end_to_end", "compiled sanitize ncu
slicing".

--dry-run goes through all of it on a machine without a GPU, on tiny shapes, the emulator and the interpreter.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from markdown_table import table

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build/gpu-check"
GRACE = 10  # seconds that a step has to write what it found, once it was interrupted
LEAST = 15  # seconds: less is not worth starting for
DRY = 5  # times as long may a step of a dry run take: whoever is patient runs it
RESERVE = 15  # seconds of the budget that are kept for the tables
PATHS = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "bench")))}
TINY = {"BENCH_MACHINE": "tiny", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(WORK / "cache")}
ROWS = ".rows.json"  # ends the name of what a benchmark found


@dataclass(frozen=True)
class Step:
    """One process: ``arguments`` of Python, and the ``tool`` that it runs under."""

    name: str
    seconds: int
    arguments: tuple[str, ...]
    tool: tuple[str, ...] = ()
    dry: tuple[str, ...] = ()  # further arguments of a dry run
    variables: Mapping[str, str] = field(default_factory=dict)


def file_of(step: str, suffix: str) -> Path:
    """Return where a step writes."""
    return WORK / f"{step.replace(': ', '-').replace(' ', '-')}{suffix}"


def bench(name: str, file: str, seconds: int, *options: str, dry: tuple[str, ...] = ()) -> Step:
    """Return the step that measures the rows of a benchmark."""
    fixed = ("-q", "--benchmark-quiet", "--timeout", "0", "--benchmark-json", str(file_of(name, ROWS)))
    return Step(name, seconds, ("-m", "pytest", f"bench/bench_{file}.py", *fixed, *options), dry=dry)


def tests(name: str, seconds: int, *options: str) -> Step:
    """Return the step that runs tests; a dry run only finds them."""
    fixed = ("-q", "-m", "not slow", "--maxfail", "5", "--timeout", "60", "--junitxml", str(file_of(name, ".xml")))
    return Step(name, seconds, ("-m", "pytest", *options, *fixed), dry=("--collect-only",))


OPS = ("norm_linear", "residual_linear", "covariance", "attend", "block")
OP_TESTS = tuple(f"tests/ops/test_{op}.py" for op in OPS[:4])
ON_GPU = "tests/patching/test_on_gpu.py"
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis")
NCU = ("ncu", *(part for name in SECTIONS for part in ("--section", name)))
NCU += ("--kernel-name", "regex:norm_linear|residual_linear|attend|partial_tiles|reduce_mirror")
PIP = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", ".")

STAGES: dict[str, tuple[Step, ...]] = {
    "install": (
        Step("install: tools", 30, ("bench/machine.py",)),
        Step("install: package", 180, PIP, dry=("--dry-run",), variables={"SLICEGPT_FAST_CUDA": "1"}),
    ),
    "smoke": (
        Step("smoke", 150, ("bench/smoke.py",), dry=("--emulate",)),
        Step("smoke: attributes", 30, ("bench/attributes.py",)),
    ),
    "ceilings": (Step("ceilings", 30, ("bench/machine.py", "--rates")),),
    "ops": tuple(bench(f"ops: {op}", op, 75, "--no-compile") for op in OPS),
    "tests": (
        tests("tests: cuda", 120, *OP_TESTS, "tests/ops/test_counters.py", "-k", "cuda or counters"),
        tests("tests: splits", 60, "tests/ops/test_cuda.py", "-k", "splits_are_exact"),
        tests("tests: patching", 120, ON_GPU),
        tests("tests: triton", 150, *OP_TESTS, "-k", "triton"),
        tests("tests: machine code", 30, "tests/native", "tests/test_build.py"),
    ),
    "tune": (Step("tune", 240, ("bench/tune.py", "--seconds", "220", "--copy", str(WORK / "tuned.json"))),),
    "end_to_end": tuple(
        bench(f"end_to_end: {backend}", "end_to_end", 90, "-k", f"end_to_end and Llama-2-7B and eager and {backend}")
        for backend in ("auto", "cuda", "triton", "reference")
    ),
    "sanitize": tuple(
        Step(
            f"sanitize: {tool}",
            120,
            ("bench/sanitize.py",),
            ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1"),
            dry=("--emulate",),
        )
        for tool in SANITIZERS
    ),
    "ncu": (Step("ncu", 90, ("bench/representative.py",), NCU, dry=("--emulate",)),),
    "slicing": (bench("slicing", "end_to_end", 120, "-k", "slicing"),),
    "compiled": (
        bench(
            "compiled: decode", "end_to_end", 240, "-k", "end_to_end and Llama-2-7B and static and auto-1",
            dry=("--collect-only",),
        ),
        *(bench(f"compiled: {op}", op, 120, "-k", "2872", dry=("--collect-only", "-k", "bench")) for op in OPS[:2]),
    ),
}  # fmt: skip


def limit(step: Step, left: float) -> float:
    """Return the seconds that a step may take of those ``left``, 0 where it is not worth starting."""
    available = left - RESERVE
    return 0 if available < min(step.seconds, LEAST) else min(step.seconds, available)


def run(command: list[str], seconds: float, log: Path, variables: Mapping[str, str]) -> str:
    """Run a command in a process group of its own for at most ``seconds``; return its status."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | variables, stdout=output, stderr=output, start_new_session=True
        )
    status = None
    try:
        status = process.wait(max(seconds - GRACE, seconds / 2))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(min(GRACE, seconds / 2))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(5)
    if status is None:
        return "killed" if process.returncode == -signal.SIGKILL else "interrupted"
    return "ok" if status == 0 else f"exit status {status}"


def command_of(step: Step, dry: bool) -> list[str]:
    """Return what a step runs."""
    return [*(() if dry else step.tool), sys.executable, *step.arguments, *(step.dry if dry else ())]


def carry_out(step: Step, left: float, dry: bool) -> dict[str, str | int]:
    """Run a step within what is left of the budget; return its line of the table."""
    step = replace(step, seconds=DRY * step.seconds) if dry else step
    begin, allowed = time.monotonic(), limit(step, left)
    line: dict[str, str | int] = {"step": step.name, "status": "", "seconds": 0, "limit": step.seconds}
    if not allowed:
        return line | {"status": f"left out: {left:.0f} s were left"}
    if step.tool and not dry and not shutil.which(step.tool[0]):
        return line | {"status": f"left out: {step.tool[0]} is not on PATH"}
    print(f"== {step.name}, {allowed:.0f} s", flush=True)
    variables = {**PATHS, **(TINY if dry else {}), **step.variables}
    status = run(command_of(step, dry), allowed, file_of(step.name, ".log"), variables)
    shortened = (
        f", shortened to {allowed:.0f} s" if allowed < step.seconds and status in ("killed", "interrupted") else ""
    )
    return line | {"status": status + shortened, "seconds": round(time.monotonic() - begin)}


def draw() -> None:
    """Renew the tables and figures of all rows so far."""
    rows = [str(file) for file in sorted(WORK.glob(f"*{ROWS}")) if file.stat().st_size]
    if rows:
        with (WORK / "report.log").open("wb") as log, suppress(subprocess.TimeoutExpired):
            command = [sys.executable, "bench/report.py", "--out", str(WORK / "report"), *rows]
            subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, timeout=RESERVE)


def pack(results: Path, text: str) -> None:
    """Put the table and everything found so far into ``results``; a reader never sees half an archive."""
    results.mkdir(parents=True, exist_ok=True)
    (WORK / "table.md").write_text(text)
    (results / "table.md").write_text(text)
    partial = results / ".results.tgz"
    with tarfile.open(partial, "w:gz") as archive:
        for file in sorted(WORK.rglob("*")):
            if file.is_file() and file.suffix in (".md", ".json", ".log", ".xml", ".png"):
                archive.add(file, file.relative_to(WORK))
    partial.replace(results / "results.tgz")


def carry_out_all(stages: list[str], seconds: float, results: Path, heading: str, dry: bool) -> Iterator[dict]:
    """Run stages, packing what they found after each; yield the lines of the table."""
    end, lines = time.monotonic() + seconds, []
    for stage in stages:
        for step in STAGES[stage]:
            lines.append(carry_out(step, end - time.monotonic(), dry))
            yield lines[-1]
        draw()
        pack(results, f"{heading}\n\n{table(lines)}\n")
        if stage == "install" and lines[-1]["status"] != "ok":
            return


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default=" ".join(STAGES), help="names, with spaces or commas (%(default)s)")
    parser.add_argument("--seconds", type=float, default=560, help="for all of it (%(default)s)")
    parser.add_argument("--results", type=Path, default=WORK, help="folder for table.md and results.tgz (%(default)s)")
    parser.add_argument("--commit", default="", help="what the table names as measured")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny shapes")
    options = parser.parse_args()
    stages = options.stages.replace(",", " ").split()
    unknown = [name for name in stages if name not in STAGES]
    if unknown:
        parser.error(f"no stage is called {unknown[0]}; there are {', '.join(STAGES)}.")
    stages = ["install", *(name for name in stages if name != "install")]
    WORK.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what runs is killed with this
    heading = f"Commit {options.commit or 'unknown'}, {options.seconds:.0f} s, {' '.join(stages)}"
    lines = list(carry_out_all(stages, options.seconds, options.results, heading, options.dry_run))
    print(f"\n{heading}\n\n{table(lines)}")
    return int(any(line["status"] != "ok" for line in lines))


if __name__ == "__main__":
    sys.exit(main())
