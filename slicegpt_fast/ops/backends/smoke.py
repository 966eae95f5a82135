"""Whether the kernels work on this GPU: each on the shapes that are hard on it, in a process of its own.

A kernel may hang, and a hung call cannot be interrupted: its process is killed after WATCHDOG seconds and costs nothing
but its own case. Results are held against fp64: the largest error is at most twice that of torch in the same dtype, and
a rounding of the largest value. Operands lie amid NaN, and so do results and workspaces before they are written.

python -m slicegpt_fast.ops.backends.smoke BACKEND NUMBER
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from subprocess import PIPE, STDOUT, Popen, TimeoutExpired
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from slicegpt_fast.errors import reason
from slicegpt_fast.kernels import measured
from slicegpt_fast.kernels.native import build_info
from slicegpt_fast.kernels.regimes import DECODE_ROWS
from slicegpt_fast.ops import tuning
from slicegpt_fast.ops.backends import cuda
from slicegpt_fast.ops.dispatch import HALF, OPS

WATCHDOG = 20  # seconds of a case, with the start of Python and what Triton compiles
AT_ONCE = max(2, min(12, (os.cpu_count() or 1) * 3 // 4))  # processes: most of their time goes into starting
BACKENDS = ("cuda", "triton")
FAST, SLOW = 8, 3  # columns of NaN before and behind an operand: rows start on 16 bytes, or they do not
SUMMED = 1e-5  # of the largest value: what sums in fp32 may be off
WORKSPACE = 1 << 22  # fp32 cells, where a case says how the work is divided


@dataclass(frozen=True)
class Case:
    """One call: [m, k] by [n, k], covariance_ of [m, n], or attend: m tokens, heads of n numbers, room for k positions;
    ``divided`` overrules the plan of the CUDA kernels."""

    op: str
    m: int
    n: int
    k: int = 0
    epilogue: str | None = None
    rank: int = 0  # of a low-rank shortcut; unscaled columns of norm_linear; numbers that values lack in attend
    beside: int = FAST
    divided: tuple[int, ...] = ()  # decode: splits; prefill: tile width, and for residual_linear splits

    def __str__(self) -> str:
        sizes = " ".join(str(x) for x in (self.m, self.n, self.k, self.rank))
        extra = [self.epilogue, "misaligned" if self.beside == SLOW else None]
        extra += [f"divided {self.divided}"] if self.divided else []
        return " ".join([self.op, sizes, *filter(None, extra)])


NORM, RESIDUAL, ATTEND, COVARIANCE = "norm_linear", "residual_linear", "attend", "covariance_"
SHORTCUTS = ("add", "dense", "transposed", "low rank", "low rank transposed")
CASES = (
    *(Case(NORM, m, 1032, 520, "silu_gate", 24) for m in (1, 8, 9, 16)),
    *(Case(NORM, m, 200, 1024, None, 8, divided=(splits,)) for m in (8, 16) for splits in (1, 2, 4, 8)),
    Case(NORM, 3, 34, 33, "gelu", 5, SLOW),
    Case(NORM, 16, 66, 1500, "silu_gate", 11, SLOW),
    *(Case(NORM, m, 4096, 1024, "silu_gate", 24) for m in (17, 300, 4096)),
    *(Case(NORM, 200, 776, 520, activation) for activation in (None, "relu", "gelu", "gelu_tanh")),
    *(Case(NORM, 300, 1040, 520, "silu_gate", 24, divided=(width,)) for width in (128, 160, 192, 208, 224, 240, 256)),
    Case(NORM, 300, 520, 333, "silu_gate", 11, SLOW),
    Case(NORM, 17, 40, 24),
    *(Case(RESIDUAL, m, 520, 1024, "dense") for m in (1, 8, 9, 16)),
    *(Case(RESIDUAL, m, 200, 1024, "dense", divided=(splits,)) for m in (8, 16) for splits in (1, 2, 4, 8)),
    *(Case(RESIDUAL, m, 200, 776, shortcut, 24) for m in (16, 200) for shortcut in SHORTCUTS),
    Case(RESIDUAL, 3, 34, 33, "low rank", 5, SLOW),
    *(Case(RESIDUAL, m, 1024, 2048, "dense") for m in (17, 64, 300, 4096)),
    *(Case(RESIDUAL, 300, 520, 776, "dense", divided=(width, 1)) for width in (128, 160, 192, 208, 224, 240, 256)),
    *(Case(RESIDUAL, 64, 520, 1984, "transposed", divided=(128, splits)) for splits in (2, 4, 8)),
    Case(RESIDUAL, 130, 301, 333, "transposed", 0, SLOW),
    *(Case(ATTEND, *sizes, rank=8) for sizes in ((1, 128, 304), (16, 64, 1000), (1, 96, 4104))),
    Case(ATTEND, 3, 78, 77, None, 5, SLOW),
    Case(COVARIANCE, 64, 40),
    Case(COVARIANCE, 300, 301, beside=SLOW),
    Case(COVARIANCE, 4096, 264),
    Case(COVARIANCE, 2500, 264, epilogue="row scale"),
    Case(COVARIANCE, 2500, 520, epilogue="mask"),
)
# The functions of slicegpt_fast._C that divide a call's work, by op and regime, and what each returns for ``divided``.
PLANS: dict[tuple[str, bool], tuple[str, Callable[..., Any]]] = {
    (NORM, True): ("cuda_norm_linear_plan", lambda splits: (splits, WORKSPACE, WORKSPACE >> 12)),
    (RESIDUAL, True): ("cuda_residual_linear_plan", lambda splits: (splits, WORKSPACE, WORKSPACE >> 12)),
    (NORM, False): ("cuda_norm_linear_prefill_width", lambda width: width),
    (RESIDUAL, False): ("cuda_residual_linear_prefill_plan", lambda width, splits: (width, splits, WORKSPACE)),
}


@dataclass(frozen=True)
class Outcome:
    """What a case came to: "ok ..." or what was wrong."""

    backend: str
    case: Case
    said: str
    seconds: float

    @property
    def right(self) -> bool:
        return self.said.startswith("ok")


def cases(backend: str) -> Iterator[int]:
    """Return the numbers of the cases that ``backend`` has a kernel for; how work is divided is the CUDA kernels'."""
    for number, case in enumerate(CASES):
        plan = PLANS.get((case.op, case.m <= DECODE_ROWS))
        can = backend == "cuda" and plan is not None and hasattr(cuda._C, plan[0])
        if not case.divided or can:
            yield number


def check_all(numbered: Iterable[tuple[str, int]], command: Sequence[str] = ()) -> Iterator[Outcome]:
    """Run cases, given as backend and number, each by ``command`` with these behind it; yield each outcome.

    A case that was killed while others were running is run again alone: the GPU may have been held by another's.
    """
    command = command or (sys.executable, "-m", "slicegpt_fast.ops.backends.smoke")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        first = pool.map(lambda each: _outcome(command, *each), numbered)
        again = []
        for outcome in first:
            if outcome.said.startswith("killed"):
                again.append((outcome.backend, CASES.index(outcome.case)))
            else:
                yield outcome
    yield from (_outcome(command, *each) for each in again)


def _outcome(command: Sequence[str], backend: str, number: int) -> Outcome:
    begin = time.monotonic()
    with Popen([*command, backend, str(number)], stdout=PIPE, stderr=STDOUT, text=True) as process:
        try:
            output, _ = process.communicate(timeout=WATCHDOG)
            lines = output.strip().splitlines() or ["it said nothing"]
            said = lines[-1] if process.returncode == 0 else f"exit status {process.returncode}: {lines[-1]}"
        except TimeoutExpired:
            process.kill()
            said = f"killed after {WATCHDOG} s"
    return Outcome(backend, CASES[number], said, time.monotonic() - begin)


def quick() -> Iterator[Outcome]:
    """Check every kernel on this GPU, each in a process of its own; yield each outcome.

    A backend whose kernels are all right is noted in the user's table, for ``auto``; one that errs is struck off it.

    Raises:
        InputError: there is no CUDA device.
    """
    gpu = measured.gpu_name(tuning.current_gpu())
    for backend in BACKENDS:
        right = []
        for outcome in check_all((backend, number) for number in cases(backend)):
            right.append(outcome.right)
            yield outcome
        passed = bool(right) and all(right)
        measured.record_passed(gpu, backend, build_info().revision if passed else None)
    for op in OPS.values():
        op.forget()


def poisoned(x: Tensor, beside: int) -> Tensor:
    """Return a view with the values of ``x`` amid NaN: what is read beside it shows."""
    *rows, width = x.shape
    store = x.new_full((*(count + 2 for count in rows), width + 2 * beside), float("nan"))
    view = store[(*(slice(1, -1) for _ in rows), slice(beside, -beside))]
    return view.copy_(x)


def operands(case: Case, dtype: torch.dtype, device: str) -> Iterator[tuple[Any, ...]]:
    """Return the op's arguments for a case, in each of the ways that a call may give them."""
    m, n, k, rank = case.m, case.n, case.k, case.rank

    def random(*shape: int, std: float = 1.0) -> Tensor:
        return poisoned((torch.randn(shape, device=device) * std).to(dtype), case.beside)

    if case.op == NORM:
        h, weight, bias = random(m, k), random(n + rank, k, std=k**-0.5), random(n)
        sumsq = h.float().square().sum(1)
        for given in (None, sumsq):
            yield h, weight, bias, 1e-5, k + 8, given, case.epilogue, rank
    elif case.op == RESIDUAL:
        a, weight, h = random(m, k), random(n, k, std=k**-0.5), random(m, n)
        shortcuts: dict[str | None, Callable[[], tuple[Tensor | None, ...]]] = {
            "add": lambda: (h, None, None),
            "dense": lambda: (None, h, random(n, n, std=n**-0.5)),
            "transposed": lambda: (None, h, random(n, n, std=n**-0.5).T),
            "low rank": lambda: (h, random(m, rank), random(rank, n, std=rank**-0.5)),
            "low rank transposed": lambda: (h, random(m, rank), random(n, rank, std=rank**-0.5).T),
        }
        for added in (None, random(n)):
            yield a, weight, added, *shortcuts[case.epilogue]()
    elif case.op == ATTEND:
        heads = [random(1, m, count, size) for count, size in ((8, n), (2, n), (2, n - rank))]
        angles = torch.rand(1, m, n, device=device) * 6
        caches = [torch.randn(1, 2, k, n, device=device).to(dtype) for _ in range(2)]
        for cache in caches:
            cache[:, :, k - 3 :] = float("nan")  # nothing stands behind the new tokens
        start = torch.tensor(k - 3 - m, device=device)
        for mask in (None, torch.rand(1, m, k, device=device) > 0.3):
            cosine, sine = angles.cos().to(dtype), angles.sin().to(dtype)
            yield *heads, cosine, sine, *caches, start, n**-0.5, mask, None, None, 0.0
    else:
        sizes = torch.logspace(-2, 1, n, device=device)
        x = poisoned(((torch.randn(m, n, device=device) + 0.5) * sizes).to(dtype), case.beside)
        scale = torch.rand(m, device=device) + 0.5 if case.epilogue == "row scale" else None
        mask = torch.rand(m, device=device) > 0.3 if case.epilogue == "mask" else None
        yield torch.eye(n, dtype=torch.float64, device=device), x, scale, mask


def check(backend: str, case: Case, device: str) -> str:
    """Run a case on ``backend`` in both half-precision dtypes; return "ok" with the largest share of what is allowed.

    Raises:
        AssertionError: a result is wrong, or a second call gives other bits.
    """
    op, share = OPS[case.op], 0.0
    for dtype in HALF if device == "cuda" or backend == "cuda" else HALF[:1]:  # Triton's interpreter has no bf16
        torch.manual_seed(0)
        for arguments in operands(case, dtype, device):
            request = op.request(*arguments)
            refusal = op.refusal(backend, request)
            if refusal is not None:
                return f"ok, refused: {refusal}"
            with divided(case), _unwritten_is_nan():
                results = [tuning.results_of(op.backends[backend].run, arguments) for _ in range(2)]
            for first, second in zip(*results, strict=True):
                assert torch.equal(first, second), f"{dtype}: a second call gives other bits"
            share = max(share, *_errors(op.backends["reference"].run, arguments, results[0], dtype))
    return f"ok, error {share:.2f} of what is allowed"


def _errors(
    reference: Callable[..., Any], arguments: tuple[Any, ...], results: tuple[Tensor, ...], dtype: torch.dtype
) -> Iterator[float]:
    """Return the largest error of each result as a share of what is allowed."""
    doubled = tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments)
    for value, by_torch, exact in zip(
        results, tuning.results_of(reference, arguments), tuning.results_of(reference, doubled), strict=True
    ):
        error = (value.double() - exact).abs().max().item()
        allowed = 2 * (by_torch.double() - exact).abs().max().item()
        allowed += max(torch.finfo(value.dtype).eps / 2, SUMMED) * exact.abs().max().item()
        assert error <= allowed, f"{dtype}: error {error:.3g}, allowed {allowed:.3g}"
        yield error / allowed


@contextmanager
def divided(case: Case) -> Iterator[None]:
    """Inside, the case's own division of work takes the place of the plan."""
    with ExitStack() as stack:
        if case.divided:
            name, plan = PLANS[case.op, case.m <= DECODE_ROWS]
            stack.enter_context(patch.object(cuda._C, name, lambda *_: plan(*case.divided)))
        yield


@contextmanager
def _unwritten_is_nan() -> Iterator[None]:
    """Inside, torch fills what it allocates with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def main(backend: str, number: str, device: str = "cuda") -> int:
    """Check one case and print what it came to; return the exit status."""
    try:
        print(check(backend, CASES[int(number)], device))
    except Exception as error:
        print(f"{type(error).__name__}: {reason(error)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
