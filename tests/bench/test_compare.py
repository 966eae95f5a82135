"""A benchmark run becomes tables and figures, and is compared with the committed one by ratios."""

import json
import sys

import pytest
from compare import compare, main
from report import kind_of, markdown, write
from timing import ratio


def results(**ratios: list[float]) -> dict:
    """A run with rows of these ops, that many times as fast as the reference."""
    rows = [
        {
            "group": op,
            "fullname": f"{op}[{number}]",
            "params": {"d": 456 + number, "dtype": "bfloat16", "M": 1},
            "extra_info": {
                "bytes": 10**6,
                "flops": 10**7,
                "read_bandwidth": 4e10,
                "matmul_rate": 7e11,
                "floor": 2.5e-5,
                "seconds": {"auto": 2e-3, "reference": 2e-3 * ratio, "torch": 3e-3},
                "times as fast": {"reference": ratio, "torch": 1.5},
                "uncertainty": {"reference": 0.04, "torch": 0.01},
            },
        }
        for op, values in ratios.items()
        for number, ratio in enumerate(values)
    ]
    machine = dict(processor="A CPU (avx2)", threads="2", date="2026-01-01", torch="2", transformers="5", python="3")
    return {"machine_info": machine, "commit_info": {"id": "0" * 40, "dirty": False}, "benchmarks": rows}


def test_lost_is_what_every_run_lost():
    baseline = results(covariance=[4.0, 1.0], norm_linear=[2.0], block=[3.0])
    slow = results(covariance=[2.0, 0.8], norm_linear=[1.0])
    good = results(covariance=[2.0, 0.8], norm_linear=[1.9])
    rows, lost = compare(baseline, [slow])
    assert lost == ["covariance", "norm_linear"]
    assert [(row["op"], row["rows"]) for row in rows] == [("covariance", 2), ("norm_linear", 1)]
    assert rows[0]["x reference, committed"] == pytest.approx(2.0)
    assert rows[0]["run 1"] == pytest.approx(1.6**0.5)
    assert compare(baseline, [slow, good])[1] == ["covariance"]
    assert compare(baseline, [baseline, slow])[1] == []


def test_two_thirds_are_enough():
    assert compare(results(block=[3.0]), [results(block=[2.01])])[1] == []
    assert compare(results(block=[3.0]), [results(block=[1.99])])[1] == ["block"]


def test_the_command_fails_only_on_a_loss(tmp_path, monkeypatch):
    def run(measured, baselines):
        (tmp_path / "run.json").write_text(json.dumps(measured))
        monkeypatch.setattr(sys, "argv", ["compare.py", str(tmp_path / "run.json"), "--baselines", str(baselines)])
        main()

    run(results(block=[1.0]), tmp_path)  # nothing to compare with
    write(results(block=[3.0]), tmp_path / "known")
    run(results(block=[3.0]), tmp_path / "known")
    with pytest.raises(SystemExit, match=r"^error: block lost more than a third of the ratio to the reference\.$"):
        run(results(block=[1.0]), tmp_path / "known")
    with pytest.raises(SystemExit, match=r"have no row in common: measure it again\.$"):
        run(results(other=[3.0]), tmp_path / "known")


def test_report(tmp_path):
    run = results(covariance=[4.0], norm_linear=[2.0, 2.5])
    for row in run["benchmarks"]:
        if row["group"] == "covariance":
            row["params"] = {"D": 576, "dtype": "float32"}
    write(run, tmp_path)
    assert kind_of(run) == "a-cpu-avx2-2-threads"
    assert {file.name for file in tmp_path.iterdir()} == {
        f"a-cpu-avx2-2-threads{end}" for end in (".json", ".md", "-roofline.png", "-speed-up.png")
    }
    assert json.loads((tmp_path / "a-cpu-avx2-2-threads.json").read_text()) == run
    text = markdown(run)
    assert "| 457 | bfloat16 | 1 | 2 | 2.50 ±4% | 1.50 ±1% | 1% |" in text
    assert "bfloat16 40 GB/s and 700 GFLOP/s, float32 40 GB/s and 700 GFLOP/s" in text


@pytest.mark.parametrize("phases", [["prefill"], ["prefill", "decode"]])
def test_report_of_whole_models(phases, tmp_path):
    run = results(end_to_end=[2.0] * len(phases))
    for row, phase in zip(run["benchmarks"], phases, strict=True):
        row["params"] = {"geometry": "Llama-2-7B", "dtype": "bfloat16", "phase": phase, "harness": "eager"}
        row["extra_info"]["tokens"] = 64
    write(run, tmp_path)
    assert (tmp_path / "a-cpu-avx2-2-threads-end-to-end.png").is_file()


def test_a_time_is_that_of_the_fastest_visit():
    theirs, ours = [[4.0, 3.0, 9.0], [5.0], [4.5]], [[2.0], [2.2, 1.0, 2.2], [7.0]]
    assert ratio(theirs, ours) == pytest.approx((2.0, 4.5 / 4 - 1 + 2.2 / 2 - 1))
    assert ratio([[3.0, 3.0, 9.0]], [[1.5]]) == (2.0, 0.0)


def test_kernels_are_compared_with_torch_and_refusals_have_reasons():
    run = results(norm_linear=[2.0])
    (row,) = run["benchmarks"]
    row["extra_info"]["seconds"]["triton"] = 1e-3
    row["extra_info"]["times as fast"]["triton"], row["extra_info"]["uncertainty"]["triton"] = 3.0, 0.02
    row["extra_info"]["refused"] = {"cuda": "too many rows"}
    text = markdown(run)
    columns = ("ms", "x reference", "x torch", "triton x torch", "triton of floor", "cuda x torch", "cuda of floor")
    assert " | ".join(columns) in text
    assert "| 2 | 2.00 ±4% | 1.50 ±1% | 3.00 ±2% | 2% | – | – | 1% |" in text
    assert "* – cuda: too many rows" in text
