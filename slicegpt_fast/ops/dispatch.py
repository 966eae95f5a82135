"""Which backend runs an op, and the registration that all ops share.

The backend of a call is the first of: its ``backend`` argument, the innermost ``use_backend`` block, the environment
variable ``SLICEGPT_FAST_BACKEND``, ``"auto"``. ``auto`` takes the first of the op's rules that fits. On a CPU the
rule names a kernel. On a GPU it names candidates: `slicegpt-fast tune` measures them and the reference shape by shape,
the fastest runs. What has not been measured runs on the reference; but on Hopper on the CUDA kernels, where the rows of
all operands are aligned and `slicegpt-fast tune --quick` has found these kernels to be right on this machine.
``kernels/measured.py`` keeps the measurements.
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
from slicegpt_fast.kernels.native import build_info
from slicegpt_fast.kernels.regimes import Epilogue, Regime, WeightFormat

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
ENVIRONMENT_VARIABLE = "SLICEGPT_FAST_BACKEND"
HALF = (torch.float16, torch.bfloat16)
KERNELS = ("triton", "cuda")  # what a GPU chooses among, by measurement
HOPPER = (9, 0)  # the compute capability that the CUDA kernels are made for

LIBRARY = torch.library.Library("slicegpt_fast", "DEF")
OPS: dict[str, Op] = {}

_in_context: ContextVar[str | None] = ContextVar("slicegpt_fast_backend", default=None)


@dataclass(frozen=True)
class Request:
    """What the choice of a backend depends on."""

    op: str
    device: torch.device
    dtype: torch.dtype
    regime: Regime
    shape: tuple[int, int, int]  # rows of the input, then N and K of the matmul; for covariance_ D and D
    epilogue: Epilogue | None = None
    weight: WeightFormat = "full"

    @property
    def capability(self) -> tuple[int, int]:
        return torch.cuda.get_device_capability(self.device) if self.device.type == "cuda" else (0, 0)

    def random(self, *shape: int, std: float = 1.0) -> Tensor:
        """Return normal values of the request's dtype on its device, for operands to measure it with."""
        return torch.randn(shape, device=self.device).mul_(std).to(self.dtype)

    def random_weight(self, n: int, k: int) -> Tensor:
        """Return a random full weight [n, k], scaled as a model's, so that no product overflows fp16."""
        return self.random(n, k, std=k**-0.5)

    def random_operand(self, n: int, k: int) -> tuple[Tensor, Tensor | None]:
        """Return a random weight [n, k] in the request's format, and its scales: at 4 bits for each 64 columns."""
        if self.weight == "full":
            return self.random_weight(n, k), None
        bits = 8 if self.weight == "int8" else 4
        dtype = torch.int8 if bits == 8 else torch.uint8
        columns, groups = (k, 1) if bits == 8 else (-(-k // 2), -(-k // 64))
        integers = torch.randint(0, 256, (n, columns), dtype=torch.uint8, device=self.device).view(dtype)
        scales = torch.rand(n, groups, device=self.device).add_(0.5).mul_(2 ** (2 - bits) * max(k, 1) ** -0.5)
        return integers, scales.half()


@dataclass(frozen=True)
class Rule:
    """One row of an op's table for ``auto``: calls that match all the columns go to the first backend that can run
    them, or to the fastest."""

    device: str
    capability: tuple[int, int]  # the lowest
    dtypes: tuple[torch.dtype, ...]  # () for any
    regime: Regime
    backends: tuple[str, ...]
    why: str

    @property
    def by_measurement(self) -> bool:
        """True where measurements choose among the backends and the reference."""
        return self.device == "cuda"

    def fits(self, request: Request) -> bool:
        return (
            self.device == request.device.type
            and self.capability <= request.capability
            and (not self.dtypes or request.dtype in self.dtypes)
            and self.regime == request.regime
        )


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Run the ops called inside the block on ``backend``, where a call does not name one itself.

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
    """Return the backend asked for, by the call, the context or the environment."""
    if backend != "auto":
        return _known(backend, "argument backend")
    return _in_context.get() or _known(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE)


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    ``run`` takes the op's arguments, checked. ``refuses`` says why it cannot run a request, or None. ``tiles`` lists
    what may be handed to ``run`` behind the arguments, for `slicegpt-fast tune` to measure each; () where ``run``
    takes nothing more.
    """

    run: Callable[..., Any]
    refuses: Callable[[Request], str | None]
    tiles: Callable[[Request], tuple[Any, ...]] = lambda request: ()


class Op:
    """An operator of the library and all that is known of it: no other module asks for an op's name.

    ``reference(*arguments)`` is the definition, in plain torch; it also runs every call with an empty tensor.
    ``check(*arguments)`` raises InputError and ``request(*arguments)`` says what the backend depends on; both run once
    for each new combination of shapes, strides, dtypes, devices and alignments. Warm calls go straight to their
    backend. ``fake(*arguments)`` makes empty results. ``operands(request)`` makes random arguments that ask for
    ``request``, ``regime(rows)`` names the regime of an input of that many rows, ``epilogues`` are all that the op
    has, ``rules`` the rows of ``auto``: what none of them takes goes to the reference.
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
        operands: Callable[[Request], tuple[Any, ...]],
        regime: Callable[[int], Regime],
        epilogues: tuple[Epilogue | None, ...],
        rules: tuple[Rule, ...],
    ) -> None:
        self.name = name
        self.check = check
        self.request = request
        self.operands = operands
        self.regime = regime
        self.epilogues = epilogues
        self.rules = rules
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

    def add_backend(
        self,
        backend: str,
        run: Callable[..., Any],
        refuses: Callable[[Request], str | None],
        tiles: Callable[[Request], tuple[Any, ...]] = lambda request: (),
    ) -> None:
        """Offer ``run`` as the op's ``backend``; arguments as in Backend."""
        self.backends[backend] = Backend(run, refuses, tiles)

    def __call__(self, *arguments: Any, backend: str) -> Any:
        """Run the op; through the reference, which autograd can follow, where a gradient is wanted."""
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
            chosen = self.choose(key[0], self.request(*inputs))
            empty = any(isinstance(x, Tensor) and x.numel() == 0 for x in inputs)
            run = self.backends["reference" if empty else chosen].run
            if len(self._plans) >= self.PLANS:
                self._plans.clear()
            self._plans[key] = run
        return run(*inputs)

    def choose(self, backend: str, request: Request) -> str:
        """Return the backend that runs ``request`` when ``backend`` was asked for.

        Raises:
            InputError: a backend asked for by name does not exist here or cannot run the request.
        """
        if backend == "auto":
            rule = next((rule for rule in self.rules if rule.fits(request)), None)
            able = [] if rule is None else [name for name in rule.backends if self.refusal(name, request) is None]
            able.append("reference")
            return _fastest(request, able) if rule is not None and rule.by_measurement else able[0]
        refusal = self.refusal(backend, request)
        if refusal is not None:
            raise InputError(f"backend {backend!r} cannot run {self.name}: {refusal}; use backend='auto'.")
        return backend

    def forget(self) -> None:
        """Let the next call of each shape choose its backend again."""
        self._plans.clear()

    def refusal(self, backend: str, request: Request) -> str | None:
        """Return why ``backend`` cannot run ``request``, or None."""
        known = self.backends.get(backend)
        return "it is not part of this installation" if known is None else known.refuses(request)


def _metadata(x: Any) -> Any:
    """Return all of an argument that a plan may depend on; no plan is made for what only stands for a tensor."""
    if type(x) in (Tensor, Parameter):
        return (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16, x.is_neg())
    return type(x) if isinstance(x, Tensor) else x


def _fastest(request: Request, able: list[str]) -> str:
    """Return the backend that was measured to be the fastest of ``able``, or what runs where nothing was measured."""
    device = measured.gpu_name(request.device)
    found = measured.lookup(device, request.op, measured.bucket(request.dtype, request.shape, request.epilogue))
    if found is not None and "reference" in found.us:
        return min((name for name in able if name in found.us), key=found.us.__getitem__)
    aligned = all(width % 8 == 0 for width in request.shape[1:])  # rows in steps of 16 bytes
    return "cuda" if "cuda" in able and aligned and _is_proven("cuda", request) else "reference"


def _is_proven(backend: str, request: Request) -> bool:
    """Return whether the kernels of a backend are made for the request's GPU and were found to be right there."""
    gpu = measured.gpu_name(request.device)
    return request.capability == HOPPER and measured.passed(gpu, backend, build_info().revision)


def require(condition: bool, message: str) -> None:
    """Raise InputError unless ``condition`` holds."""
    if not condition:
        raise InputError(message)


def check_matrix(name: str, x: Tensor, dtype: torch.dtype | None = None, device: torch.device | None = None) -> None:
    """Raise InputError unless ``x`` is a floating-point matrix, of the given dtype and device where they are given."""
    require(x.dim() == 2, f"argument {name} has {x.dim()} dimensions; pass a matrix.")
    require(x.is_floating_point(), f"argument {name} has dtype {x.dtype}; pass a floating-point tensor.")
    _check_type(name, x, dtype, device)


def check_vector(
    name: str, x: Tensor | None, length: Any, dtype: torch.dtype | None, device: torch.device | None
) -> None:
    """Raise InputError unless ``x`` is None or a vector of that length, dtype and device."""
    if x is not None:
        require(
            x.dim() == 1 and x.shape[0] == length,
            f"argument {name} has shape {list(x.shape)}; its shape must be [{length}].",
        )
        _check_type(name, x, dtype, device)


def _check_type(name: str, x: Tensor, dtype: torch.dtype | None, device: torch.device | None) -> None:
    require(dtype is None or x.dtype == dtype, f"argument {name} has dtype {x.dtype}; it must be {dtype}.")
    require(device is None or x.device == device, f"argument {name} is on {x.device}; move it to {device}.")


def kernel_table() -> list[dict[str, str]]:
    """Return the rules of ``auto``, op by op, each with what serves it here: what `info --kernels` prints."""
    return [
        {
            "op": op.name,
            "device": rule.device if rule.device == "cpu" else "cuda >= {}.{}".format(*rule.capability),
            "dtypes": ", ".join(str(dtype).removeprefix("torch.") for dtype in rule.dtypes) or "any",
            "regime": rule.regime,
            "backend": f"fastest of {', '.join(rule.backends)}, reference" if rule.by_measurement else rule.backends[0],
            "why": f"{rule.why}; {_tuned_here(op, rule)}" if rule.by_measurement else rule.why,
        }
        for op in OPS.values()
        for rule in op.rules
    ]


def _tuned_here(op: Op, rule: Rule) -> str:
    """Return what is measured on this machine's GPU of the calls that ``rule`` is for."""
    if not torch.cuda.is_available():
        return "reference: there is no CUDA device here"
    keys = measured.buckets(measured.gpu_name(_current()), op.name)
    rows = [most for most in measured.BUCKETS if op.regime(most) == rule.regime]
    count = sum(f" M<={most} " in key for key in keys for most in rows)
    proven = measured.passed(measured.gpu_name(_current()), "cuda", build_info().revision)
    unmeasured = "cuda where aligned, else reference," if proven else "reference"
    return (
        f"measured at {count} shapes, {unmeasured} at all others"
        if count
        else f"{unmeasured} until `slicegpt-fast tune`"
    )


def _current() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
