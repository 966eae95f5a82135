"""Whole decode steps: consecutive decoder layers of a patched model in one native call.

    forward of the base model (embedding, masks, rotary angles, loop over layers, final norm): transformers', as ever
      layer 0 --> all layers of the run, natively: norm_linear, attend, residual_linear, norm_linear, residual_linear
      layer 1, 2, ... --> hand on what they are given

Python between the ops costs more than the ops themselves where they have few rows. So the first layer of a run, if the
call is one that is known, hands its arguments to a decode program, and the loop over the others goes on with what comes
back. What is known: inference on a CPU, up to DECODE_ROWS tokens, a dynamic or static cache of transformers, every part
of every layer fused and unchanged since, attention by ``sdpa``. Everything else goes layer by layer, in the same
conversation: a cache holds the same either way.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from slicegpt_fast import _C
from slicegpt_fast.architectures import Branch, Decoder, Heads
from slicegpt_fast.kernels.native import ACTIVATIONS, DTYPES, WEIGHT_DTYPES
from slicegpt_fast.kernels.operands import heads, tokens
from slicegpt_fast.kernels.regimes import DECODE_ROWS
from slicegpt_fast.ops.dispatch import asked_for
from slicegpt_fast.patching.caches import Rooms, RoomsInUse
from slicegpt_fast.patching.guards import Forward, Guard, home_of, infers, is_known
from slicegpt_fast.patching.layers import FusedAttention, FusedBranch, FusedLayer, FusedSublayer, running
from slicegpt_fast.patching.packing import where
from slicegpt_fast.slicing.layers import AlignedShortcut, WeightlessNorm

# The arguments of a decoder layer that a run takes in beside the cache; any other must be None or False.
ARGUMENTS = {"attention_mask", "position_embeddings", "position_ids", "cache_position", "use_cache"}

QUERY_KEY_NORMS = ("q_norm", "k_norm")
RECORDINGS = ("output_attentions", "output_hidden_states")  # what a base model gathers layer by layer, where asked to


class DecodeSteps:
    """The forward of the base model of a patched model, in which runs of layers take whole steps."""

    def __init__(self, decoder: Decoder, layers: Sequence[FusedLayer], backend: str) -> None:
        """``layers``: those with a fused part."""
        base_path, _, name = decoder.architecture.layers.rpartition(".")
        self.module = decoder.model.get_submodule(base_path)
        self.config = decoder.model.config
        self.backend = backend
        self.refused: str | None = None  # why no step is to run whole
        self.forwards: dict[nn.Module, Forward] = {self.module: self.forward}
        self.reasons: dict[int, str] = {}  # of the layers that no run has, why
        listed = cast(nn.ModuleList, self.module._modules[name])
        self.count = len(listed)
        fused = {layer.layer: layer for layer in layers}
        known: list[tuple[int, FusedLayer]] = []
        for index, module in enumerate(decoder.layers):
            reason = _refusal(fused.get(module), decoder)
            if reason is None:
                known.append((index, fused[module]))
            else:
                self.reasons[index] = reason
        self.guard = Guard(
            [(name, self.module, name), *((str(index), listed, str(index)) for index, _ in known)],
            {layer.layer: layer.forward for _, layer in known},
            (self.module,),
        )
        self.runs = [Run(index, run, decoder) for index, run in _runs(known, self.config)]
        self._starts = {run.layers[0]: run for run in self.runs}

    def forward(self, *positional: Any, **named: Any) -> Any:
        base = self.module
        if torch.compiler.is_compiling() or not self._usable(named):
            return type(base).forward(base, *positional, **named)
        outer = running.step
        running.step = Step(self._starts)
        try:
            return type(base).forward(base, *positional, **named)
        finally:
            running.step = outer

    def _usable(self, named: dict[str, Any]) -> bool:
        """Whether a call of the base model may take whole steps, as far as that is seen before it begins."""
        return (
            bool(self.runs)
            and self.unused() is None
            and not torch.is_grad_enabled()
            and not any(named.get(name, getattr(self.config, name, False)) for name in RECORDINGS)
        )

    def unused(self) -> str | None:
        """Why no step would run whole now, or None."""
        if self.refused is not None:
            return self.refused
        if asked_for(self.backend) not in ("auto", "cpu"):
            return f"backend {asked_for(self.backend)!r} was asked for"
        if self.config._attn_implementation != "sdpa":
            return f"the attention implementation is {self.config._attn_implementation!r}, not 'sdpa'"
        if ALL_ATTENTION_FUNCTIONS.get("sdpa") is not sdpa_attention_forward:
            return "another function is registered as the attention implementation 'sdpa'"
        if self.config.num_hidden_layers != self.count:
            return f"the config says {self.config.num_hidden_layers} layers, not {self.count}"
        return self.guard.changed()

    def __str__(self) -> str:
        """What runs whole, and why the other layers do not."""
        reason = self.unused()
        if reason is None and self.runs and self.runs[0].device.type != "cpu":
            reason = "they run on CPUs alone"
        if reason is not None:
            return f"decode steps layer by layer: {reason}"
        whole = [f"{run.index}-{run.index + len(run.layers) - 1}" for run in self.runs]
        text = f"decode steps of layers {', '.join(whole)} in one native call each" if whole else ""
        if self.reasons:
            index, reason = next(iter(self.reasons.items()))
            text += f"{'; ' if whole else 'decode steps layer by layer: '}layer {index}: {reason}"
        return text


class Step:
    """One call of the base model: which layers have been done already."""

    def __init__(self, starts: dict[FusedLayer, Run]) -> None:
        self._starts = starts
        self._done: Iterator[FusedLayer] = iter(())
        self._next: FusedLayer | None = None
        self._result: Tensor | None = None

    def take(
        self, layer: FusedLayer, hidden_states: Tensor, positional: tuple[Any, ...], named: dict[str, Any]
    ) -> Tensor | None:
        """What comes out of ``layer``, as far as the model can tell; None where it is to run by itself."""
        if layer is self._next and hidden_states is self._result:
            self._next = next(self._done, None)
            return hidden_states
        run = self._starts.get(layer)
        if run is None:
            return None
        self._result = run.step(
            hidden_states, named | dict(zip(layer.architecture.positional, positional, strict=False))
        )
        if self._result is not None:
            self._done = iter(run.layers[1:])
            self._next = next(self._done, None)
        return self._result


FRESH = ("_lock", "_program", "_state")  # what a copy of a run makes for itself


class Run:
    """Consecutive layers with one decode program."""

    def __init__(self, index: int, layers: list[FusedLayer], decoder: Decoder) -> None:
        self.index = index  # of the first layer
        self.layers = layers
        self.sublayers = [sublayer for layer in layers for sublayer in layer.sublayers.values()]
        self.attentions = [branch for branch in _branches(self.sublayers) if isinstance(branch, FusedAttention)]
        self.heads = decoder.heads
        self.cache_name = decoder.architecture.cache
        self.guard = Guard.joined(sublayer.guard for sublayer in self.sublayers)
        self._slots = [slot for sublayer in self.sublayers for slot in sublayer.weights.slots]
        self._fresh()

    @property
    def device(self) -> torch.device:
        return self.sublayers[0].branches[0].reader.weights[0].matrix.device

    def _fresh(self) -> None:
        self._lock = threading.Lock()
        self._program: Program | None = None
        self._state: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in FRESH}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._fresh()

    def step(self, hidden_states: Tensor, arguments: dict[str, Any]) -> Tensor | None:
        """hidden_states [B, T, d] behind all layers of the run; None where the call is not one that is known."""
        others = (value for name, value in arguments.items() if name not in ARGUMENTS and name != self.cache_name)
        if any(value is not None and value is not False for value in others):
            return None
        B, T, _ = hidden_states.shape
        if (
            not 0 < B * T <= DECODE_ROWS
            or hidden_states.device.type != "cpu"
            or any(layer.layer.training for layer in self.layers)
        ):
            return None
        if not infers(self.layers[0].layer, hidden_states):
            return None
        if any(sublayer.refused or sublayer.biased() for sublayer in self.sublayers) or self.guard.changed():
            return None
        if not self._packed():
            return None
        if not self._lock.acquire(blocking=False):
            return None  # another thread is in it
        try:
            return self._step(hidden_states, arguments)
        finally:
            self._lock.release()

    def _packed(self) -> bool:
        """Whether all weights lie as they were packed, or could be packed again."""
        if self._state != where(self._slots):
            if any(sublayer.weights.refresh() is not None for sublayer in self.sublayers):
                return False
            self._state = where(self._slots)
        return True

    def _step(self, hidden_states: Tensor, arguments: dict[str, Any]) -> Tensor | None:
        dtype = hidden_states.dtype
        if self._program is None or self._program.dtype != dtype or self._program.stale():
            taken = all(sublayer.weights.take(dtype) for sublayer in self.sublayers)
            if not taken or not _usable_norms(_branches(self.sublayers), dtype):
                return None
            self._program = Program(self.sublayers, self.heads, dtype)
        program = self._program
        B, T, _ = hidden_states.shape
        indices = [cast(int, attention.module.layer_idx) for attention in self.attentions]
        caches = program.rooms.use(arguments.get(self.cache_name), indices, B, T)
        mask = arguments.get("attention_mask")
        if caches is None or not _fits(mask, B, T, caches):
            return None
        result = program.run(hidden_states, arguments.get("position_embeddings"), mask, caches)
        caches.append()
        return result


def _fits(mask: Any, batch: int, new: int, caches: RoomsInUse) -> bool:
    """Whether ``attend`` takes a layer's mask: sdpa's own, bool [1 or B, 1, T, positions], or none where that means
    that a token attends to all before it."""
    if mask is None:
        return not caches.fixed and (new == 1 or caches.start == 0)
    if type(mask) is not Tensor or mask.dtype != torch.bool or mask.dim() != 4:
        return False
    rows, heads, columns, positions = mask.shape
    enough = positions >= caches.start + new if caches.fixed else positions == caches.start + new
    return rows in (1, batch) and heads == 1 and columns == new and enough


class Program:
    """A decode program, its activations' memory, and what it was made from."""

    def __init__(self, sublayers: list[FusedSublayer], heads: Heads, dtype: torch.dtype) -> None:
        self._sublayers = sublayers
        self._heads = heads
        self._native = _C.Program()
        self._memory: dict[tuple[str, int], Tensor] = {}
        self._values = self._read()
        self.dtype = dtype
        self.rooms = Rooms(heads, self.dtype, self._native)
        width = sublayers[0].branches[0].reader.width
        self._input = stream = self._rows("stream 0", width)
        for number, sublayer in enumerate(sublayers):
            stream = self._add(sublayer, stream, number)
        self._output = stream

    def stale(self) -> bool:
        """Whether what the program holds of the layers has changed: their weights' memory, a number in a module."""
        return self._values != self._read()

    def run(self, h: Tensor, angles: tuple[Tensor, Tensor] | None, mask: Tensor | None, caches: RoomsInUse) -> Tensor:
        (B, T, d), rows = h.shape, h.shape[0] * h.shape[1]
        self._input[:rows].copy_(h.view(rows, d))
        cosine, sine = (None, None) if angles is None else map(tokens, angles)
        self._native.run(
            B, T, caches.first, caches.start, cosine, sine, None if mask is None else tokens(mask[:, 0]),
            torch.get_num_threads(),
        )  # fmt: skip
        return self._output[:rows].view(B, T, -1).clone()

    def _read(self) -> list[Any]:
        found: list[Any] = [sublayer.weights.packs for sublayer in self._sublayers]
        for branch in _branches(self._sublayers):
            found += [getattr(branch.norm, cast(str, branch.eps_name)), branch.norm.__dict__.get("full_width")]
            if isinstance(branch, FusedAttention):
                found += [branch.module.scaling, branch.module.is_causal]
            for norm in _weighted_norms(branch):
                weight = cast(Tensor, norm.weight)
                found += [type(weight), weight.data_ptr(), norm.__dict__.get("variance_epsilon")]
        return found

    def _rows(self, use: str, width: int) -> Tensor:
        """Memory [DECODE_ROWS, width], shared by all that use it for the same."""
        if (use, width) not in self._memory:
            with torch.inference_mode(False):  # or nobody outside of it could write into them
                self._memory[use, width] = torch.empty(DECODE_ROWS, width, dtype=self.dtype)
        return self._memory[use, width]

    def _add(self, sublayer: FusedSublayer, h: Tensor, number: int) -> Tensor:
        """Add the ops of a sublayer that reads h; return the memory of its result."""
        written = h
        for index, branch in enumerate(sublayer.branches):
            read = self._read_stream(branch, h)
            scaled = read[:, : read.shape[1] - branch.unscaled]
            a = self._attend(branch, scaled) if isinstance(branch, FusedAttention) else scaled
            residual, a2, weight2 = self._shortcut(sublayer, h, read) if index == 0 else (written, None, None)
            # A sublayer reads h until its last op, and has two results at most: a third memory is free.
            written = self._rows(f"stream {(2 * number + index + 1) % 4}", branch.writer.matrix.shape[0])
            writer = branch.writer
            self._native.residual_linear(
                a, writer.matrix, writer.scales, writer.bias, residual, a2, weight2, written,
                WEIGHT_DTYPES[writer.matrix.dtype], DTYPES[self.dtype],
            )  # fmt: skip
        return written

    def _read_stream(self, branch: FusedBranch, h: Tensor) -> Tensor:
        weight, norm = branch.reader.matrix, branch.norm
        eps = cast(float, getattr(norm, cast(str, branch.eps_name)))
        if isinstance(norm, WeightlessNorm):
            norm_weight, full_width = None, norm.full_width
        else:
            norm_weight, full_width = cast(Tensor, norm.weight), h.shape[1]
        rows = weight.shape[0] - branch.unscaled
        read = self._rows("read", (rows // 2 if branch.activation == "silu_gate" else rows) + branch.unscaled)
        self._native.norm_linear(
            h, weight, branch.reader.scales, norm_weight, branch.bias, read, branch.unscaled, eps, full_width,
            ACTIVATIONS[branch.activation], WEIGHT_DTYPES[weight.dtype], DTYPES[self.dtype],
        )  # fmt: skip
        return read

    def _attend(self, branch: FusedAttention, read: Tensor) -> Tensor:
        queries, keys, values = qkv(branch.branch, self._heads, read)
        rank = values.shape[-1]
        y = self._rows("heads", self._heads.queries * rank)
        q_norm, k_norm = (cast(Any, getattr(branch.module, name, None)) for name in QUERY_KEY_NORMS)
        self._native.attend(
            heads(queries), heads(keys), heads(values), q_norm and q_norm.weight, k_norm and k_norm.weight, y,
            self._heads.size, rank, q_norm.variance_epsilon if q_norm else 0.0, cast(float, branch.module.scaling),
            DTYPES[self.dtype],
        )  # fmt: skip
        return y

    def _shortcut(
        self, sublayer: FusedSublayer, h: Tensor, read: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """``residual``, ``a2`` and ``weight2`` of residual_linear; the program negates t = h U by itself."""
        shortcut = sublayer.shortcut
        if shortcut is None:
            return h, None, None
        if not isinstance(shortcut, AlignedShortcut):
            return None, h, cast(Tensor, shortcut.weight).T
        if shortcut.up is None:
            return h, None, None
        return h, read[:, read.shape[1] - shortcut.up.in_features :], shortcut.up.weight.T


def qkv(branch: Branch, heads: Heads, read: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys [1, M, heads, D] and values [1, M, G, r] in the packed projection's result [M, n]."""
    H, G, D = heads.queries, heads.values, heads.size
    if branch.inputs[0].grouped:
        per_group = read[None].unflatten(-1, (G, -1))
        return per_group[..., :D], per_group[..., D : 2 * D], per_group[..., 2 * D :]
    queries, keys, values = read[None].split([H * D, G * D, read.shape[1] - (H + G) * D], -1)
    return queries.unflatten(-1, (H, D)), keys.unflatten(-1, (G, D)), values.unflatten(-1, (G, -1))


def _weighted_norms(branch: FusedBranch) -> list[nn.Module]:
    """The norms of a branch with a weight: a dense model's, those of queries and keys."""
    norms = [] if isinstance(branch.norm, WeightlessNorm) else [branch.norm]
    if isinstance(branch, FusedAttention):
        norms += [norm for name in QUERY_KEY_NORMS if isinstance(norm := getattr(branch.module, name, None), nn.Module)]
    return norms


def _usable_norms(branches: Iterable[FusedBranch], dtype: torch.dtype) -> bool:
    """Whether a program takes the weights of the norms as they are now, and one epsilon for queries and keys."""
    for branch in branches:
        for norm in _weighted_norms(branch):
            weight = norm._parameters.get("weight")
            if type(weight) is not nn.Parameter or weight.dtype != dtype or not weight.is_contiguous():
                return False
        if isinstance(branch, FusedAttention):
            norms = [getattr(branch.module, name, None) for name in QUERY_KEY_NORMS]
            if len({getattr(norm, "variance_epsilon", None) for norm in norms}) > 1:
                return False
    return True


def _branches(sublayers: Iterable[FusedSublayer]) -> Iterator[FusedBranch]:
    return (branch for sublayer in sublayers for branch in sublayer.branches)


def _runs(known: list[tuple[int, FusedLayer]], config: Any) -> Iterator[tuple[int, list[FusedLayer]]]:
    """Consecutive layers of one type, which the base model gives equal arguments."""
    types = getattr(config, "layer_types", None)

    def key(item: tuple[int, tuple[int, FusedLayer]]) -> tuple[int, Any]:
        position, (index, _) = item
        return index - position, types and types[index]

    for _, members in groupby(enumerate(known), key):
        layers = [member for _, member in members]
        yield layers[0][0], [layer for _, layer in layers]


def _refusal(layer: FusedLayer | None, decoder: Decoder) -> str | None:
    """Why a layer cannot be part of a run, or None."""
    architecture, heads = decoder.architecture, decoder.heads
    if layer is None or len(layer.sublayers) < len(architecture.sublayers):
        return "not all of it is fused"
    if not architecture.attends:
        return "its attention is not the one of the op attend"
    for sublayer in layer.sublayers.values():
        if isinstance(sublayer.shortcut, AlignedShortcut) and sublayer.shortcut.padding:
            return "its stream grows wider"
        for branch in sublayer.branches:
            if branch.eps_name is None:
                name = type(branch.norm).__name__
                return f"its {name} is no plain RMSNorm: slice the model first, at sparsity=0 to keep all of it"
            if branch.branch.multiplier is not None:
                return "what its branches add to the stream is scaled"
            if isinstance(branch, FusedAttention):
                reason = _unlike_attend(branch, heads, home_of(decoder.model))
                if reason is not None:
                    return reason
            elif branch.activation is None:
                return "its activation is none of norm_linear's"
    return None


def _unlike_attend(branch: FusedAttention, heads: Heads, family: str) -> str | None:
    """Why an attention computes something else than the op ``attend``, or None."""
    module = branch.module
    projections = {weight.owner for packed in (branch.reader, branch.writer) for weight in packed.weights}
    norms = {name: getattr(module, name, None) for name in QUERY_KEY_NORMS}
    for name, child in module.named_modules():
        if child is module or child in projections or not any(True for _ in child.parameters(recurse=False)):
            continue
        is_norm = name in norms and type(child).__name__.endswith("RMSNorm") and hasattr(child, "variance_epsilon")
        if not is_norm or not is_known(type(child), f"transformers.models.{family}"):
            return f"its attention has a {name}, a {type(child).__name__}"
    if branch.branch.inputs[0].grouped and heads.queries != heads.values:
        return "its query heads share keys in one weight"
    if not isinstance(getattr(module, "scaling", None), float):
        return "its attention has no scaling"
    return None
