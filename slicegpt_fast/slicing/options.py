"""What a slice is asked for: its options, once, and the checks of them that need no model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Literal, TypedDict, cast

import torch

from slicegpt_fast.architectures import AXES, Axis
from slicegpt_fast.errors import InputError, check_choice, is_whole
from slicegpt_fast.kernels.regimes import TILE

Basis = Literal["per-norm", "shared"] | int
Signal = Literal["raw", "normalized"]
Shortcut = Literal["dense", "aligned"]
Schedule = Literal["uniform", "variance"]
RoundTo = int | Literal["auto"]
Budget = Literal["params", "bytes", "flops"]

ROUND_TO = 8  # the published step
# What sizes are multiples of where nothing else is asked for, by axis and device type.
STEPS: dict[Axis, dict[str, int]] = {
    "stream": TILE,
    "channels": {"cpu": 32, "cuda": 128},
    "values": {"cpu": 8, "cuda": 8},
}
# The options that choose a basis plan for the residual stream; a cut makes these choices itself.
PLAN_OPTIONS = ("basis", "signal", "shortcut", "shortcut_rank", "schedule", "refit", "slice_head")


@dataclass(frozen=True)
class SliceOptions:
    """How much of a model a slice keeps, and how that is chosen.

    Attributes:
        sparsity: share of the hidden size to delete, in [0, 1). Give one of this, ``target_params`` and ``widths``.
        target_params: stored parameters of the decoder blocks after slicing, shortcuts included, as a share of before.
        widths: the kept size of every norm site, the final norm's last.
        cut: what ``target_params`` deletes: some of the axes ``"stream"`` (directions of the residual stream),
            ``"channels"`` (of each MLP) and ``"values"`` (dimensions of each attention's values), or ``"auto"``, all of
            them, wherever it costs least. The default with ``target_params``, unless an option below chooses a plan.
        budget: what ``target_params`` counts of a cut: ``"params"``, their ``"bytes"``, or the ``"flops"`` of a token.
        uniform: a cut gives all layers one size along each axis.
        basis: ``"per-norm"`` (the default of a slice without cuts) for a basis at every norm with shortcuts between
            them, as published; ``"shared"`` for one basis and no shortcuts (the head is then always sliced too); a
            number for that many groups of norms.
        signal: what the bases are fitted to, each norm's input (``"raw"``) or its output (``"normalized"``).
        shortcut: ``"dense"`` matrices, as published, or ``"aligned"``: the same model with shortcuts that are the
            identity minus a matrix of rank D - d at most, stored as two thin factors.
        shortcut_rank: truncate aligned shortcuts to this rank.
        schedule: ``"uniform"`` gives all sites one size; ``"variance"`` gives every basis the same share of its
            variance, within ``target_params``.
        refit: re-fit the readers to the dense model's normalised inputs by least squares, in a second pass over the
            calibration text. SmolLM2's held-out perplexity gains from it, the more the more text (docs/benchmarks).
        round_to: kept sizes are multiples of this, 8 by default; ``"auto"`` picks one for the model's device. A cut
            rounds the stream and the channels to it, by default to 16 and 32 (64 and 128 on a GPU); the dimensions of
            the values are always multiples of 8.
        slice_head: slice the last block's output and the head too.

    Raises:
        InputError: an option is out of range, contradicts another, or not exactly one gives the size.
    """

    sparsity: float | None = None
    target_params: float | None = None
    widths: Sequence[int] | None = None
    cut: Literal["auto"] | Sequence[Axis] | None = None
    budget: Budget = "params"
    uniform: bool = False
    basis: Basis | None = None
    signal: Signal = "raw"
    shortcut: Shortcut = "dense"
    shortcut_rank: int | None = None
    schedule: Schedule = "uniform"
    refit: bool = False
    round_to: RoundTo | None = None
    slice_head: bool = False

    def __post_init__(self) -> None:
        check_choice("signal", self.signal, Signal)
        check_choice("shortcut", self.shortcut, Shortcut)
        check_choice("schedule", self.schedule, Schedule)
        self._check_size()
        self._check_cut()
        rank = self.shortcut_rank
        if rank is not None and (self.shortcut == "dense" or not is_whole(rank) or rank < 0):
            raise InputError(f"shortcut_rank truncates shortcut='aligned' to a rank of 0 or more, not {rank!r}.")
        if self.round_to not in (None, "auto") and (not is_whole(self.round_to) or self.round_to < 1):
            raise InputError(f"round_to must be 'auto' or a whole number of at least 1, not {self.round_to!r}.")

    def _check_size(self) -> None:
        """Check the options that give the size."""
        if self.schedule == "variance" and self.target_params is None:
            raise InputError("schedule='variance' spends a budget: give target_params.")
        if sum(value is not None for value in (self.sparsity, self.target_params, self.widths)) != 1:
            raise InputError("give exactly one of sparsity, target_params and widths.")
        for name in ("sparsity", "target_params"):
            if not isinstance(share := getattr(self, name), Real | None):
                raise InputError(f"{name} must be a number, not {share!r}.")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise InputError(f"sparsity must be at least 0 and below 1, not {self.sparsity}.")
        if self.target_params is not None and not 0 < self.target_params <= 1:
            raise InputError(f"target_params must be above 0 and at most 1, not {self.target_params}.")
        if not isinstance(self.widths, Iterable | None):
            raise InputError(f"widths must be a list with the size of every norm site, not {self.widths!r}.")

    def _check_cut(self) -> None:
        """Check the options of a cut."""
        check_choice("budget", self.budget, Budget)
        if self.cut is not None:
            axes = self.axes if isinstance(self.cut, Sequence) else ()
            if not axes or any(axis not in AXES for axis in axes) or len(set(axes)) < len(axes):
                raise InputError(f"cut must be 'auto' or some of {', '.join(map(repr, AXES))}, not {self.cut!r}.")
            if self.target_params is None:
                raise InputError("cut spends a budget: give target_params.")
            if self._plan_option is not None:
                raise InputError(f"cut chooses {self._plan_option} itself: leave one of the two out.")
        elif not self.axes and (self.budget != "params" or self.uniform):
            raise InputError("budget and uniform belong to cut: give target_params, and leave the basis to it.")

    @property
    def _plan_option(self) -> str | None:
        """The first option that chooses a basis plan."""
        defaults = {field.name: field.default for field in fields(self)}
        return next((name for name in PLAN_OPTIONS if getattr(self, name) != defaults[name]), None)

    @property
    def axes(self) -> tuple[Axis, ...]:
        """What a cut deletes; empty where a basis plan is asked for."""
        if self.cut is None:
            return AXES if self.target_params is not None and self._plan_option is None else ()
        return AXES if self.cut == "auto" else tuple(self.cut)

    @property
    def stream_basis(self) -> Basis:
        """The basis of a slice without cuts."""
        return "per-norm" if self.basis is None else self.basis

    @property
    def slices_head(self) -> bool:
        """Whether the last block's output and the head are sliced: a shared basis is theirs too."""
        return self.slice_head or self.basis == "shared"

    def step(self, device: torch.device) -> int:
        """Return what kept sizes are multiples of for a model on ``device``."""
        if self.round_to == "auto":
            return TILE.get(device.type, TILE["cpu"])
        return ROUND_TO if self.round_to is None else int(self.round_to)

    def cut_step(self, axis: Axis, device: torch.device) -> int:
        """Return what the sizes of a cut along ``axis`` are multiples of."""
        if is_whole(self.round_to) and axis != "values":
            return self.round_to
        return STEPS[axis].get(device.type, STEPS[axis]["cpu"])

    def arguments(self) -> "SliceArguments":
        """Return the options as keyword arguments of a function."""
        return cast(SliceArguments, dict(vars(self)))


class SliceArguments(TypedDict, total=False):
    """The fields of :class:`SliceOptions` as keyword arguments of a function; a test holds one to the other."""

    sparsity: float | None
    target_params: float | None
    widths: Sequence[int] | None
    cut: Literal["auto"] | Sequence[Axis] | None
    budget: Budget
    uniform: bool
    basis: Basis | None
    signal: Signal
    shortcut: Shortcut
    shortcut_rank: int | None
    schedule: Schedule
    refit: bool
    round_to: RoundTo | None
    slice_head: bool
