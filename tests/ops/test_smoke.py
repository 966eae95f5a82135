"""The check of every kernel tells wrong from right, outlives one that hangs, and notes what passed."""

import sys
from dataclasses import replace

import pytest
import torch

from slicegpt_fast.kernels import measured
from slicegpt_fast.kernels.native import build_info
from slicegpt_fast.ops import tuning
from slicegpt_fast.ops.backends import smoke
from slicegpt_fast.ops.backends.smoke import CASES, Case, Outcome, check, check_all
from slicegpt_fast.ops.dispatch import OPS

SMALL = [
    Case("norm_linear", 3, 34, 33, "silu_gate", 2, smoke.SLOW),
    Case("residual_linear", 3, 34, 33, "low rank", 5, smoke.SLOW),
    Case("attend", 3, 16, 40, rank=4),
    Case("covariance_", 20, 17, epilogue="mask"),
]
PROGRAM = "import signal, sys; backend, number = sys.argv[1:]; print('ok', number) if backend == 'right' else "


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.op)
def test_right_kernels_pass(case):
    assert check("cpu", case, "cpu").startswith("ok, error 0.")


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.op)
def test_one_wrong_element_fails(case, monkeypatch):
    op = OPS[case.op]
    right = op.backends["cpu"].run

    def wrong(first, *arguments):
        returned = right(first, *arguments)
        result = first if returned is None else returned[0] if isinstance(returned, tuple) else returned
        result[-1, -1] += 0.5 * result.abs().max()
        return returned

    monkeypatch.setitem(op.backends, "cpu", replace(op.backends["cpu"], run=wrong))
    with pytest.raises(AssertionError, match=r"float16: error .*, allowed"):
        check("cpu", case, "cpu")


def test_what_is_left_unwritten_fails(monkeypatch):
    op = OPS["norm_linear"]
    monkeypatch.setitem(op.backends, "cpu", replace(op.backends["cpu"], run=lambda h, *_: h.new_empty(3, 19)))
    with pytest.raises(AssertionError):
        check("cpu", SMALL[0], "cpu")
    assert not torch.are_deterministic_algorithms_enabled()


def test_operands_lie_amid_nan():
    view = smoke.poisoned(torch.ones(3, 8).half(), smoke.SLOW)
    assert torch.equal(view, torch.ones(3, 8).half())
    assert view.data_ptr() % 16
    assert smoke.poisoned(torch.ones(3, 8).half(), smoke.FAST).data_ptr() % 16 == 0
    around = view.as_strided((5, 14), view.stride(), 0)
    assert around.isnan().sum() == 5 * 14 - 3 * 8


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("signal.pause()", "killed after 3 s"),
        ("sys.exit('wrong')", "exit status 1: wrong"),
        ("signal.raise_signal(signal.SIGSEGV)", "exit status -11: it said nothing"),
        ("None", "it said nothing"),
    ],
)
def test_a_case_that_fails_costs_itself_alone(program, said, monkeypatch):
    monkeypatch.setattr(smoke, "WATCHDOG", 3)
    command = (sys.executable, "-S", "-c", PROGRAM + program)
    outcomes = {o.backend: o for o in check_all([("wrong", 0), ("right", 1)], command)}
    assert outcomes["right"].said == "ok 1"
    assert outcomes["right"].right
    assert outcomes["wrong"].said == said
    assert not outcomes["wrong"].right
    assert outcomes["wrong"].case == CASES[0]


def test_every_case_may_run_somewhere():
    for backend in smoke.BACKENDS:
        numbers = list(smoke.cases(backend))
        assert {CASES[number].op for number in numbers} == {op.name for op in OPS.values() if backend in op.backends}
    assert len(set(CASES)) == len(CASES)
    for case in CASES:
        assert case.op == "covariance_" or case.k
        assert all(x % 8 == 0 for x in (case.n, case.k, case.rank)) or case.beside == smoke.SLOW


@pytest.mark.parametrize("wrong", ["cuda", None])
def test_what_passed_is_noted(wrong, cache, monkeypatch):
    monkeypatch.setattr(tuning, "current_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(
        smoke, "check_all", lambda cases: (Outcome(b, CASES[n], "wrong" if b == wrong else "ok", 0.0) for b, n in cases)
    )
    revision = build_info().revision
    measured.record_passed("cpu", "cuda", revision)
    assert len(list(smoke.quick())) == sum(len(list(smoke.cases(backend))) for backend in smoke.BACKENDS)
    assert measured.passed("cpu", "cuda", revision) == (wrong is None)
    assert measured.passed("cpu", "triton", revision)
