"""What a slice is asked for: its options, once, and the checks of them that need no model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, TypeGuard, cast

import torch

from slicegpt_fast.errors import InputError, check_choice
from slicegpt_fast.kernels.regimes import TILE

Basis = Literal["per-norm", "shared"] | int
Signal = Literal["raw", "normalized"]
Shortcut = Literal["dense", "aligned"]
Schedule = Literal["uniform", "variance"]
RoundTo = int | Literal["auto"]


@dataclass(frozen=True)
class SliceOptions:
    """How much of a model a slice keeps, and how that is chosen.

    Attributes:
        sparsity: share of the hidden size to delete, in [0, 1). Give one of this, ``target_params`` and ``widths``.
        target_params: stored parameters of the decoder blocks after slicing, shortcuts included, as a share of before.
        widths: the kept size of every norm site, the final norm's last.
        basis: ``"per-norm"`` for a basis at every norm with shortcuts between them, as published; ``"shared"`` for one
            basis and no shortcuts (the head is then always sliced too); a number for that many groups of norms.
        signal: what the bases are fitted to, each norm's input (``"raw"``) or its output (``"normalized"``).
        shortcut: ``"dense"`` matrices, as published, or ``"aligned"``: the same model with shortcuts that are the
            identity minus a matrix of rank D - d at most, stored as two thin factors.
        shortcut_rank: truncate aligned shortcuts to this rank.
        schedule: ``"uniform"`` gives all sites one size; ``"variance"`` gives every basis the same share of its
            variance, within ``target_params``.
        refit: re-fit the readers to the dense model's normalised inputs by least squares, in a second pass over the
            calibration text. SmolLM2's held-out perplexity gains from it, the more the more text (docs/benchmarks).
        round_to: kept sizes are multiples of this; ``"auto"`` picks one for the model's device.
        slice_head: slice the last block's output and the head too.

    Raises:
        InputError: an option is out of range, contradicts another, or not exactly one gives the size.
    """

    sparsity: float | None = None
    target_params: float | None = None
    widths: Sequence[int] | None = None
    basis: Basis = "per-norm"
    signal: Signal = "raw"
    shortcut: Shortcut = "dense"
    shortcut_rank: int | None = None
    schedule: Schedule = "uniform"
    refit: bool = False
    round_to: RoundTo = 8
    slice_head: bool = False

    def __post_init__(self) -> None:
        check_choice("signal", self.signal, Signal)
        check_choice("shortcut", self.shortcut, Shortcut)
        check_choice("schedule", self.schedule, Schedule)
        self._check_size()
        rank = self.shortcut_rank
        if rank is not None and (self.shortcut == "dense" or not is_whole(rank) or rank < 0):
            raise InputError(f"shortcut_rank truncates shortcut='aligned' to a rank of 0 or more, not {rank!r}.")
        if self.round_to != "auto" and (not is_whole(self.round_to) or self.round_to < 1):
            raise InputError(f"round_to must be 'auto' or a whole number of at least 1, not {self.round_to!r}.")

    def _check_size(self) -> None:
        """Check the options that give the size."""
        if self.schedule == "variance" and self.target_params is None:
            raise InputError("schedule='variance' spends a budget: give target_params.")
        if sum(value is not None for value in (self.sparsity, self.target_params, self.widths)) != 1:
            raise InputError("give exactly one of sparsity, target_params and widths.")
        for name in ("sparsity", "target_params"):
            if not isinstance(share := getattr(self, name), int | float | None):
                raise InputError(f"{name} must be a number, not {share!r}.")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise InputError(f"sparsity must be at least 0 and below 1, not {self.sparsity}.")
        if self.target_params is not None and not 0 < self.target_params <= 1:
            raise InputError(f"target_params must be above 0 and at most 1, not {self.target_params}.")
        if not isinstance(self.widths, Sequence | None):
            raise InputError(f"widths must be a list with the size of every norm site, not {self.widths!r}.")

    @property
    def slices_head(self) -> bool:
        """Whether the last block's output and the head are sliced: a shared basis is theirs too."""
        return self.slice_head or self.basis == "shared"

    def step(self, device: torch.device) -> int:
        """Return what kept sizes are multiples of for a model on ``device``."""
        return TILE.get(device.type, TILE["cpu"]) if self.round_to == "auto" else self.round_to

    def arguments(self) -> "SliceArguments":
        """Return the options as keyword arguments of a function."""
        return cast(SliceArguments, dict(vars(self)))


class SliceArguments(TypedDict, total=False):
    """The fields of :class:`SliceOptions` as keyword arguments of a function; a test holds one to the other."""

    sparsity: float | None
    target_params: float | None
    widths: Sequence[int] | None
    basis: Basis
    signal: Signal
    shortcut: Shortcut
    shortcut_rank: int | None
    schedule: Schedule
    refit: bool
    round_to: RoundTo
    slice_head: bool


def is_whole(number: object) -> TypeGuard[int]:
    """Whether ``number`` is an integer, which True and False are not."""
    return isinstance(number, int) and not isinstance(number, bool)
