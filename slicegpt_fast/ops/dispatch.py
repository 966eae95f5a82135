"""Which backend runs an op, and the registration that the three ops share.

The backend of a call is the first of: its ``backend`` argument, the innermost ``use_backend`` block, the environment
variable ``SLICEGPT_FAST_BACKEND``, ``"auto"``. ``auto`` takes the row of the table AUTO that fits. On a CPU the row
names a kernel. On a GPU it names candidates: `slicegpt-fast tune` measures them and the reference shape by shape, the
fastest runs, and what has not been measured runs on the reference. ``kernels/measured.py`` keeps the measurements.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from slicegpt_fast.errors import InputError
from slicegpt_fast.kernels import measured
from slicegpt_fast.kernels.regimes import DECODE_ROWS

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
ENVIRONMENT_VARIABLE = "SLICEGPT_FAST_BACKEND"
HALF = (torch.float16, torch.bfloat16)

LIBRARY = torch.library.Library("slicegpt_fast", "DEF")
OPS: dict[str, Op] = {}

_in_context: ContextVar[str | None] = ContextVar("slicegpt_fast_backend", default=None)


@dataclass(frozen=True)
class Request:
    """What the choice of a backend depends on."""

    op: str
    device: torch.device
    dtype: torch.dtype
    regime: str  # "tall" for covariance_; "decode" (M <= 16) or "prefill" for the matmuls
    shape: tuple[int, int, int]  # rows of the input, then N and K of the matmul; for covariance_ D and D
    epilogue: str | None = None  # the activation; the kind of shortcut: "add", "dense", "low rank"; "row scale"

    @property
    def capability(self) -> tuple[int, int]:
        return torch.cuda.get_device_capability(self.device) if self.device.type == "cuda" else (0, 0)


def regime_of(op: str, rows: int) -> str:
    """The regime of a call with an input of that many rows."""
    return "tall" if op == "covariance_" else "decode" if rows <= DECODE_ROWS else "prefill"


@dataclass(frozen=True)
class Rule:
    """One row of the table: calls that match all the columns go to the first backend that can run them, or to the
    fastest."""

    op: str
    device: str
    capability: tuple[int, int]  # the lowest
    dtypes: tuple[torch.dtype, ...]  # () for any
    regime: str
    backends: tuple[str, ...]
    why: str

    @property
    def measured(self) -> bool:
        """True where measurements choose among the backends and the reference."""
        return self.device == "cuda"

    def fits(self, request: Request) -> bool:
        return (
            self.op == request.op
            and self.device == request.device.type
            and self.capability <= request.capability
            and (not self.dtypes or request.dtype in self.dtypes)
            and self.regime == request.regime
        )


KERNELS = ("triton", "cuda")
AUTO = (
    Rule("covariance_", "cuda", (8, 0), HALF, "tall", KERNELS, "half the FLOPs of a full matmul"),
    Rule("norm_linear", "cuda", (8, 0), HALF, "decode", KERNELS, "one pass over the weight"),
    Rule("norm_linear", "cuda", (8, 0), HALF, "prefill", KERNELS, "no norm kernel"),
    Rule("residual_linear", "cuda", (8, 0), HALF, "decode", KERNELS, "one pass over the weights"),
    Rule("residual_linear", "cuda", (8, 0), HALF, "prefill", KERNELS, "no add kernel"),
    Rule("covariance_", "cpu", (0, 0), (), "tall", ("cpu",), "half the FLOPs of a full matmul"),
    Rule("norm_linear", "cpu", (0, 0), (), "decode", ("cpu",), "one pass over the weight"),
    Rule("norm_linear", "cpu", (0, 0), HALF[:1], "prefill", ("cpu",), "torch's fp16 matmul is slow"),
    Rule("residual_linear", "cpu", (0, 0), (), "decode", ("cpu",), "one pass over the weights"),
    Rule("residual_linear", "cpu", (0, 0), HALF[:1], "prefill", ("cpu",), "torch's fp16 matmul is slow"),
)  # what no row takes goes to "reference"


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Runs the ops called inside the block on ``backend``, where a call does not name one itself.

    Raises:
        InputError: ``backend`` is none of BACKENDS.
    """
    _known(backend, "argument backend")
    token = _in_context.set(backend)
    try:
        yield
    finally:
        _in_context.reset(token)


def _known(backend: str, where: str) -> str:
    if backend not in BACKENDS:
        raise InputError(f"{where} is {backend!r}; it must be one of {', '.join(BACKENDS)}.")
    return backend


def asked_for(backend: str) -> str:
    """The backend asked for, by the call, the context or the environment."""
    if backend != "auto":
        return _known(backend, "argument backend")
    return _in_context.get() or _known(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE)


@dataclass(frozen=True)
class Backend:
    """``run`` takes the op's arguments; ``refuses`` says why it cannot run a request, or None."""

    run: Callable[..., Any]
    refuses: Callable[[Request], str | None]


class Op:
    """An operator of the library: schema, checks, fake implementation, backends, and a plan per tensor metadata.

    ``check(*arguments)`` raises InputError and ``request(*arguments)`` says what the backend depends on; both run once
    for each new combination of shapes, strides, dtypes, devices and alignments. Warm calls go straight to their
    backend.
    """

    PLANS = 4096

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        reference: Callable[..., Any],
        check: Callable[..., None],
        request: Callable[..., Request],
        fake: Callable[..., Any],
    ) -> None:
        self.name = name
        self.check = check
        self.request = request
        self.backends = {"reference": Backend(reference, lambda request: None)}
        self._plans: dict[tuple[Any, ...], Callable[..., Any]] = {}
        LIBRARY.define(name + schema)
        LIBRARY.impl(name, self._run, "CompositeExplicitAutograd")

        def checked_fake(*arguments: Any) -> Any:
            check(*arguments[:-1])
            return fake(*arguments[:-1])

        torch.library.register_fake(f"slicegpt_fast::{name}", checked_fake, lib=LIBRARY)
        self.overload = getattr(torch.ops.slicegpt_fast, name).default
        OPS[name] = self

    def add_backend(self, backend: str, run: Callable[..., Any], refuses: Callable[[Request], str | None]) -> None:
        """Offers ``run`` as the op's ``backend``; it is called with the op's arguments, checked."""
        self.backends[backend] = Backend(run, refuses)

    def __call__(self, *arguments: Any, backend: str) -> Any:
        """Runs the op; through the reference, which autograd can follow, where a gradient is wanted."""
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
            self.check(*arguments)
            return self.backends["reference"].run(*arguments)
        if not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack():
            run = self._plans.get((asked_for(backend), *map(_metadata, arguments)))
            if run is not None:  # a plan that was made below the dispatcher, whose 3 us a warm call so saves
                return run(*arguments)
        return self.overload(*arguments, backend)

    def _run(self, *arguments: Any) -> Any:
        *inputs, backend = arguments
        key = (asked_for(backend), *map(_metadata, inputs))
        run = self._plans.get(key)
        if run is None:
            self.check(*inputs)
            run = self.backends[self.choose(key[0], self.request(*inputs))].run
            if len(self._plans) >= self.PLANS:
                self._plans.clear()
            self._plans[key] = run
        return run(*inputs)

    def choose(self, backend: str, request: Request) -> str:
        """The backend that runs ``request`` when ``backend`` was asked for.

        Raises:
            InputError: a backend asked for by name does not exist here or cannot run the request.
        """
        if backend == "auto":
            rule = next((rule for rule in AUTO if rule.fits(request)), None)
            able = [] if rule is None else [name for name in rule.backends if self.refusal(name, request) is None]
            able.append("reference")
            return _fastest(request, able) if rule is not None and rule.measured else able[0]
        refusal = self.refusal(backend, request)
        if refusal is not None:
            raise InputError(f"backend {backend!r} cannot run {self.name}: {refusal}; use backend='auto'.")
        return backend

    def forget(self) -> None:
        """Lets the next call of each shape choose its backend again."""
        self._plans.clear()

    def refusal(self, backend: str, request: Request) -> str | None:
        """Why ``backend`` cannot run ``request``, or None."""
        known = self.backends.get(backend)
        return "it is not part of this installation" if known is None else known.refuses(request)


def _metadata(x: Any) -> Any:
    """All of an argument that a plan may depend on. No plan is ever made for a tensor that only stands for another."""
    if type(x) in (Tensor, Parameter):
        return (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16, x.is_neg())
    return type(x) if isinstance(x, Tensor) else x


def _fastest(request: Request, able: list[str]) -> str:
    """The backend that was measured to be the fastest of ``able``; where the reference was not measured, that."""
    device = measured.gpu_name(request.device)
    found = measured.lookup(device, request.op, measured.bucket(request.dtype, request.shape, request.epilogue))
    if found is None or "reference" not in found.us:
        return "reference"
    return min((name for name in able if name in found.us), key=found.us.__getitem__)


def require(condition: bool, message: str) -> None:
    """Raises InputError unless ``condition`` holds."""
    if not condition:
        raise InputError(message)


def check_matrix(name: str, x: Tensor, dtype: torch.dtype | None = None, device: torch.device | None = None) -> None:
    """Raises InputError unless ``x`` is a floating-point matrix, of the given dtype and device where they are given."""
    require(x.dim() == 2, f"argument {name} has {x.dim()} dimensions; pass a matrix.")
    require(x.is_floating_point(), f"argument {name} has dtype {x.dtype}; pass a floating-point tensor.")
    _check_kind(name, x, dtype, device)


def check_vector(
    name: str, x: Tensor | None, length: Any, dtype: torch.dtype | None, device: torch.device | None
) -> None:
    """Raises InputError unless ``x`` is None or a vector of that length, dtype and device."""
    if x is not None:
        require(
            x.dim() == 1 and x.shape[0] == length,
            f"argument {name} has shape {list(x.shape)}; its shape must be [{length}].",
        )
        _check_kind(name, x, dtype, device)


def _check_kind(name: str, x: Tensor, dtype: torch.dtype | None, device: torch.device | None) -> None:
    require(dtype is None or x.dtype == dtype, f"argument {name} has dtype {x.dtype}; it must be {dtype}.")
    require(device is None or x.device == device, f"argument {name} is on {x.device}; move it to {device}.")


def kernel_table() -> list[dict[str, str]]:
    """The rows of ``auto``, in order, each with what serves it here: what `info --kernels` prints."""
    return [
        {
            "op": rule.op,
            "device": rule.device if rule.device == "cpu" else "cuda >= {}.{}".format(*rule.capability),
            "dtypes": ", ".join(str(dtype).removeprefix("torch.") for dtype in rule.dtypes) or "any",
            "regime": rule.regime,
            "backend": f"fastest of {', '.join(rule.backends)}, reference" if rule.measured else rule.backends[0],
            "why": f"{rule.why}; {_tuned_here(rule)}" if rule.measured else rule.why,
        }
        for rule in AUTO
    ]


def _tuned_here(rule: Rule) -> str:
    """What is measured on this machine's GPU of the calls that ``rule`` is for."""
    if not torch.cuda.is_available():
        return "reference: there is no CUDA device here"
    keys = measured.buckets(measured.gpu_name(torch.device("cuda", torch.cuda.current_device())), rule.op)
    rows = [most for most in measured.BUCKETS if regime_of(rule.op, most) == rule.regime]
    count = sum(f" M<={most} " in key for key in keys for most in rows)
    return f"measured at {count} shapes, reference at all others" if count else "reference until `slicegpt-fast tune`"
