"""``patch_model``: run a Hugging Face model's decoder layers on the fused ops, in place, and undo it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from types import MethodType

from torch import nn
from transformers import PreTrainedModel

from slicegpt_fast.architectures import Decoder
from slicegpt_fast.errors import InputError
from slicegpt_fast.ops.dispatch import BACKENDS, OPS, asked_for
from slicegpt_fast.patching.guards import NotFusable, Place, Replicas, forward_slot, home_of
from slicegpt_fast.patching.head import FusedHead
from slicegpt_fast.patching.layers import FusedLayer, FusedSublayer, Requests
from slicegpt_fast.patching.packing import DTYPES
from slicegpt_fast.patching.report import PartReport, PatchReport
from slicegpt_fast.patching.selfcheck import Call, compare, compare_steps, record
from slicegpt_fast.patching.steps import DecodeSteps

__all__ = ["PatchReport", "is_patched", "patch_model", "patch_report", "unpatch_model"]


NO_KERNEL = {"reference", "torch", "reference + torch", "torch + reference"}  # what torch's own path is as fast as

Options = tuple[str, tuple[str, ...], tuple[str, ...]]  # backend, include, exclude


@dataclass
class Patch:
    """What was done to a model; kept on the model."""

    options: Options
    parts: dict[str, FusedSublayer | FusedHead | str] = field(default_factory=dict)  # str: why it stays as it is
    layers: list[FusedLayer] = field(default_factory=list)
    steps: DecodeSteps | None = None
    check: str = ""  # what the self-check came to
    replaced: list[tuple[nn.Module, object, object]] = field(default_factory=list)  # the forwards, new and old

    def fused(self) -> dict[str, FusedSublayer | FusedHead]:
        """The parts with a fused form."""
        return {name: part for name, part in self.parts.items() if not isinstance(part, str)}

    def hold_against(self, model: PreTrainedModel, calls: dict[nn.Module, Call] | str) -> None:
        """Refuse the parts that do not compute what their modules did in ``calls``; a sentence where there are none."""
        if isinstance(calls, str):
            self.check = f"not checked: {calls}"
            return
        parts = self.fused()
        compare(model, self.layers, next((p for p in parts.values() if isinstance(p, FusedHead)), None), calls)
        self.check = "checked on a few tokens"
        for name, part in parts.items():
            if part.refused is not None:
                warnings.warn(f"{name} stays unfused: {part.refused}.", stacklevel=3)
        if self.steps is not None and self.steps.runs and self.steps.unused() is None:
            compare_steps(model, self.steps)
            if self.steps.refused is not None:
                warnings.warn(f"decode steps go layer by layer: {self.steps.refused}.", stacklevel=3)

    def apply(self) -> None:
        """Sets the fused forwards."""
        parts = (*self.fused().values(), *self.layers, *([] if self.steps is None else [self.steps]))
        for module, forward in chain.from_iterable(part.forwards.items() for part in parts):
            slot = forward_slot(module)
            self.replaced.append((module, forward, module.__dict__.get(slot)))
            setattr(module, slot, forward)
            module._replicate_for_data_parallel = Replicas(module, forward).make  # type: ignore[assignment]

    def undo(self) -> None:
        """Brings the old ones back, but where somebody has set another one since."""
        for module, forward, before in self.replaced:
            module.__dict__.pop("_replicate_for_data_parallel", None)
            for slot in ("forward", "_old_forward"):  # accelerate's hooks may have come or gone since
                if module.__dict__.get(slot) == forward:
                    delattr(module, slot)
                    if before is not None or slot == "_old_forward":
                        setattr(module, slot, before or MethodType(type(module).forward, module))


def patch_model(
    model: PreTrainedModel,
    *,
    backend: str = "auto",
    include: Iterable[str] = ("*",),
    exclude: Iterable[str] = (),
    strict: bool = False,
    check: bool = True,
) -> PreTrainedModel:
    """Run the decoder layers of ``model`` on the fused ops, in place, for this instance alone.

    Fused is what runs in evaluation mode and without autograd (``generate``, ``torch.no_grad()``); everything else goes
    through the layers as they were, and so does a sublayer on which somebody hangs a hook or an adapter later.
    Parameters keep their names, shapes and values; those that one op reads together come to lie in one matrix, of which
    they are views: no memory is added.

    Patch after moving the model to its device and dtype, and before ``torch.compile``.

    Args:
        model: a causal language model of transformers, sliced or dense, of a family that can be sliced.
        backend: which kernels: "auto", "reference", "cpu", "triton" or "cuda".
        include, exclude: patterns (``fnmatch``) of the names that ``patch_report`` lists, such as
            "model.layers.3.attention" or "*.feedforward".
        strict: raise instead of warn where nothing could be fused.
        check: hold each part against the unpatched model on 12 tokens (two short forwards), and leave unfused what
            differs by more than rounding.

    Returns:
        ``model``.

    Raises:
        InputError: not such a model, an unsupported dtype, a layer split over devices, a backend that cannot run
            here, a pattern that fits nothing, or a model that was patched with other options.
    """
    if backend not in BACKENDS:
        raise InputError(f"argument backend is {backend!r}; it must be one of {', '.join(BACKENDS)}.")
    options = (backend, _patterns("include", include), _patterns("exclude", exclude))
    existing = _patch_of(model)
    if existing is not None:
        if existing.options != options:
            raise InputError("the model is already patched with other options: call unpatch_model first.")
        return model
    decoder = Decoder(model)
    if model.dtype not in DTYPES:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise InputError(f"model has dtype {model.dtype}; the ops take {dtypes}: convert it with model.to().")

    patch = _fuse(decoder, options)
    message = f"no decoder layer was patched: {next(iter(patch.parts.values()))}."
    if strict and not patch.layers:
        raise InputError(message)
    modules = [part.module for part in patch.fused().values()]
    calls = record(model, dict.fromkeys(modules)) if check else "check=False"
    model._slicegpt_fast_patch = patch  # type: ignore[assignment]
    try:
        patch.apply()
        for fused in patch.layers:
            fused.attach()
        patch.hold_against(model, calls)
    except BaseException:
        unpatch_model(model)
        raise
    if not patch.layers:
        warnings.warn(message, stacklevel=2)
    return model


def unpatch_model(model: PreTrainedModel) -> PreTrainedModel:
    """Undo ``patch_model``: the model computes bit for bit what it did before. No effect on a model without a patch.

    Returns:
        ``model``.
    """
    patch = _patch_of(model)
    if patch is None:
        return model
    del model._slicegpt_fast_patch
    patch.undo()
    for fused in patch.layers:
        fused.release()
    return model


def is_patched(model: PreTrainedModel) -> bool:
    """Return whether ``patch_model`` was called on a model and not undone."""
    return _patch_of(model) is not None


def patch_report(model: PreTrainedModel) -> PatchReport:
    """What serves each part of a patched model now, or why it runs as it did before.

    Raises:
        InputError: the model is not patched.
    """
    patch = _patch_of(model)
    if patch is None:
        raise InputError("the model is not patched: call patch_model first.")
    rows = tuple(_row(name, part, asked_for(patch.options[0])) for name, part in patch.parts.items())
    return PatchReport(rows, str(patch.steps or ""), patch.check)


def op_requests(model: PreTrainedModel) -> Requests:
    """What the ops are asked for once ``model`` is patched; its weights may be absent (on the device "meta")."""
    found: Requests = []
    decoder = Decoder(model)
    for site, sublayer in decoder.sublayers():
        with suppress(NotFusable):
            part = FusedSublayer(site.part, decoder.architecture, sublayer, home_of(model), model.dtype, "auto")
            found += part.requests()
    with suppress(NotFusable):
        found += FusedHead(_head(decoder), model.dtype, "auto").requests()
    return found


def _fuse(decoder: Decoder, options: Options) -> Patch:
    """The fused form of every part of a model that has one, and why the others have none."""
    names = [f"{site.path}.{sublayer.name}" for site, sublayer in decoder.sublayers()]
    for pattern in options[1] + options[2]:
        if not any(fnmatchcase(name, pattern) for name in (*names, decoder.head_path)):
            raise InputError(
                f"no part of the model is called {pattern!r}; the parts are {names[0]} ... {decoder.head_path}."
            )
    patch = Patch(options)
    layers: dict[int, FusedLayer] = {}
    of_model = (home_of(decoder.model), decoder.model.dtype)
    for name, (site, sublayer) in zip(names, decoder.sublayers(), strict=True):
        _check_devices(site.path, site.part)
        fuse = partial(FusedSublayer, site.part, decoder.architecture, sublayer, *of_model)
        part = patch.parts[name] = _fused(name, options, fuse)
        if isinstance(part, FusedSublayer):
            if site.index not in layers:
                layers[site.index] = FusedLayer(site.part, decoder.architecture)
            layers[site.index].sublayers[sublayer.name] = part
    fuse_head = partial(FusedHead, _head(decoder), decoder.model.dtype)
    patch.parts[decoder.head_path] = _fused(decoder.head_path, options, fuse_head)
    patch.layers = list(layers.values())
    if patch.layers:
        patch.steps = DecodeSteps(decoder, patch.layers, options[0])
    return patch


def _row(name: str, part: FusedSublayer | FusedHead | str, backend: str) -> PartReport:
    reason = part if isinstance(part, str) else "training mode" if part.module.training else part.unfused()
    if isinstance(part, str) or reason is not None:
        return PartReport(name, "", "", "", reason)
    decode, prefill = _backends(part.requests(), backend)
    return PartReport(name, " + ".join(request.op for request, _ in part.requests()), decode, prefill, None)


def _backends(requests: Requests, backend: str) -> tuple[str, ...]:
    """The backends that serve a part's ops in decode and in prefill."""
    chosen = [[OPS[each.op].choose(backend, each) if each else "torch" for each in pair] for pair in requests]
    return tuple(" + ".join(dict.fromkeys(names)) for names in zip(*chosen, strict=True))


def _fused(
    name: str, options: Options, fuse: Callable[[str], FusedSublayer | FusedHead]
) -> FusedSublayer | FusedHead | str:
    """A part in its fused form, or why it stays as it is."""
    backend, include, exclude = options
    if not any(fnmatchcase(name, pattern) for pattern in include) or any(fnmatchcase(name, p) for p in exclude):
        return "left out by include or exclude"
    try:
        part = fuse(backend)
    except NotFusable as reason:
        return str(reason)
    if part.absent():
        return "its weights are offloaded"
    served = set(_backends(part.requests(), backend))  # raises where the backend cannot run here
    if asked_for(backend) == "auto" and _on_gpu(part.requests()) and served <= NO_KERNEL:
        return "no kernel is known to be faster on this GPU: run slicegpt-fast tune"
    return part


def _on_gpu(requests: Requests) -> bool:
    return all(decode.device.type == "cuda" for decode, _ in requests)


def _head(decoder: Decoder) -> Place:
    """Where the language head stands."""
    parent, _, name = decoder.head_path.rpartition(".")
    return decoder.head_path, decoder.model.get_submodule(parent), name


def _patch_of(model: PreTrainedModel) -> Patch | None:
    return getattr(model, "__dict__", {}).get("_slicegpt_fast_patch")


def _patterns(argument: str, patterns: Iterable[str]) -> tuple[str, ...]:
    if isinstance(patterns, str) or not isinstance(patterns, Iterable):
        raise InputError(f"argument {argument} is {patterns!r}; pass a list of patterns.")
    return tuple(map(str, patterns))


def _check_devices(name: str, layer: nn.Module) -> None:
    devices = sorted({str(p.device) for p in layer.parameters() if p.device.type != "meta"})
    if len(devices) > 1:
        raise InputError(f"{name} has weights on {' and '.join(devices)}: move each decoder layer to one device.")
