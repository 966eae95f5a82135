"""``patch_model``: run a Hugging Face model's decoder layers on the fused ops, in place, and undo it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel

from slicegpt_fast.architectures import architecture_of
from slicegpt_fast.errors import InputError
from slicegpt_fast.ops.dispatch import BACKENDS, OPS, Request
from slicegpt_fast.patching.head import FusedHead
from slicegpt_fast.patching.layers import DTYPES, FusedLayer, FusedSublayer, NotFusable
from slicegpt_fast.patching.report import PatchReport, Row

__all__ = ["PatchReport", "patch_model", "patch_report", "unpatch_model"]


@dataclass
class Patch:
    """What was done to a model; kept on the model."""

    options: tuple[str, tuple[str, ...], tuple[str, ...]]
    layers: dict[str, FusedLayer] = field(default_factory=dict)
    head: FusedHead | None = None
    refusals: dict[str, str] = field(default_factory=dict)  # of the parts that stay as they are

    def forwards(self) -> Iterator[tuple[nn.Module, str, object]]:
        """Module, attribute and value of everything that is set on the model."""
        for fused in self.layers.values():
            for sublayer in fused.sublayers.values():
                yield from ((module, "forward", forward) for module, forward in sublayer.forwards.items())
            yield fused.layer, fused.slot, fused.replacement
        if self.head is not None:
            yield self.head.linear, "forward", self.head.replacement


def patch_model(
    model: PreTrainedModel,
    *,
    backend: str = "auto",
    include: Iterable[str] = ("*",),
    exclude: Iterable[str] = (),
    strict: bool = False,
) -> PreTrainedModel:
    """Runs the decoder layers of ``model`` on the fused ops, in place, for this instance alone.

    Fused is what runs in evaluation mode and without autograd (``generate``, ``torch.no_grad()``); everything else goes
    through the layers as they were, and so does a sublayer on which somebody hangs a hook or an adapter later.
    Parameters keep their names, shapes and values; those that one op reads together come to lie in one matrix. A dense
    model's norm weights are folded into a copy of the matrices that read them: slice first to save that memory.

    Patch after moving the model to its device and dtype, and before ``torch.compile``.

    Args:
        model: a causal language model of transformers, sliced or dense, of a family that can be sliced.
        backend: which kernels: "auto", "reference", "cpu", "triton" or "cuda".
        include, exclude: patterns (``fnmatch``) of the names that ``patch_report`` lists, such as
            "model.layers.3.attention" or "*.feedforward".
        strict: raise instead of warn where nothing could be fused.

    Returns:
        ``model``.

    Raises:
        InputError: not such a model, an unsupported dtype, a layer split over devices, a backend that cannot run
            here, a pattern that fits nothing, or a model that was patched with other options.
    """
    architecture = architecture_of(model)
    if backend not in BACKENDS:
        raise InputError(f"argument backend is {backend!r}; it must be one of {', '.join(BACKENDS)}.")
    options = (backend, _patterns("include", include), _patterns("exclude", exclude))
    existing = _patch_of(model)
    if existing is not None:
        if existing.options != options:
            raise InputError("the model is already patched with other options: call unpatch_model first.")
        return model
    if model.dtype not in DTYPES:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise InputError(f"model has dtype {model.dtype}; the ops take {dtypes}: convert it with model.to().")

    names = [f"{architecture.layers}.{index}.{sublayer.name}" for index, _, sublayer in architecture.sites(model)]
    head = model.get_output_embeddings()
    head_name = next(name for name, module in model.named_modules() if module is head)
    for pattern in options[1] + options[2]:
        if not any(fnmatchcase(name, pattern) for name in (*names, head_name)):
            raise InputError(f"no part of the model is called {pattern!r}; the parts are {names[0]} ... {head_name}.")

    patch = Patch(options)
    for name, (index, layer, sublayer) in zip(names, architecture.sites(model), strict=True):
        layer_name = f"{architecture.layers}.{index}"
        _check_devices(layer_name, layer)
        try:
            _require_chosen(name, options)
            fused = FusedSublayer(layer, sublayer, backend)
            _backends(fused.requests(), backend)
        except NotFusable as reason:
            patch.refusals[name] = str(reason)
            continue
        patch.layers.setdefault(layer_name, FusedLayer(layer, architecture)).sublayers[sublayer.name] = fused
    try:
        _require_chosen(head_name, options)
        patch.head = FusedHead(head, backend)
        _backends(patch.head.requests(), backend)
    except NotFusable as reason:
        patch.refusals[head_name] = str(reason)

    if not patch.layers:
        message = f"nothing of the model was patched: {next(iter(patch.refusals.values()))}."
        if strict:
            raise InputError(message)
        warnings.warn(message, stacklevel=2)
    model._slicegpt_fast_patch = patch  # type: ignore[assignment]
    try:
        for fused_layer in patch.layers.values():
            fused_layer.pack()
        for module, attribute, forward in patch.forwards():
            setattr(module, attribute, forward)
    except BaseException:
        unpatch_model(model)
        raise
    return model


def unpatch_model(model: PreTrainedModel) -> PreTrainedModel:
    """Undoes ``patch_model``: the model computes bit for bit what it did before. No effect on a model without a patch.

    Returns:
        ``model``.
    """
    patch = _patch_of(model)
    if patch is None:
        return model
    del model._slicegpt_fast_patch
    for module, attribute, forward in patch.forwards():
        if module.__dict__.get(attribute) == forward:
            delattr(module, attribute)
    for fused in patch.layers.values():
        fused.release()
    return model


def patch_report(model: PreTrainedModel) -> PatchReport:
    """What serves each part of a patched model now, or why it runs as it did before.

    Raises:
        InputError: the model is not patched.
    """
    patch = _patch_of(model)
    if patch is None:
        raise InputError("the model is not patched: call patch_model first.")
    architecture = architecture_of(model)
    rows = []
    for index, layer, sublayer in architecture.sites(model):
        layer_name = f"{architecture.layers}.{index}"
        name = f"{layer_name}.{sublayer.name}"
        if name in patch.refusals:
            rows.append(_unfused(name, patch.refusals[name]))
            continue
        fused = patch.layers[layer_name].sublayers[sublayer.name]
        reason = "training mode" if layer.training else fused.changed()
        rows.append(_row(name, fused.requests(), fused.copied_bytes, patch.options[0], reason))
    if patch.head is not None:
        name = next(name for name, module in model.named_modules() if module is patch.head.linear)
        rows.append(replace(_row(name, patch.head.requests(), 0, patch.options[0], None), prefill="torch"))
    rows += [
        _unfused(name, reason) for name, reason in patch.refusals.items() if not name.startswith(architecture.layers)
    ]
    return PatchReport(tuple(rows))


def _row(name: str, requests: list[tuple[Request, Request]], copied: int, backend: str, reason: str | None) -> Row:
    decode, prefill = _backends(requests, backend)
    ops = " + ".join(request.op for request, _ in requests)
    return _unfused(name, reason) if reason else Row(name, ops, decode, prefill, copied, None)


def _unfused(name: str, reason: str) -> Row:
    return Row(name, "", "", "", 0, reason)


def _backends(requests: list[tuple[Request, Request]], backend: str) -> tuple[str, ...]:
    """The backends that serve a sublayer's ops in decode and in prefill."""
    chosen = [[OPS[request.op].choose(backend, request) for request in pair] for pair in requests]
    return tuple(" + ".join(dict.fromkeys(names)) for names in zip(*chosen, strict=True))


def _patch_of(model: PreTrainedModel) -> Patch | None:
    return model.__dict__.get("_slicegpt_fast_patch")


def _patterns(argument: str, patterns: Iterable[str]) -> tuple[str, ...]:
    if isinstance(patterns, str):
        raise InputError(f"argument {argument} is one string; pass a list of patterns.")
    return tuple(patterns)


def _require_chosen(name: str, options: tuple[str, tuple[str, ...], tuple[str, ...]]) -> None:
    _, include, exclude = options
    if not any(fnmatchcase(name, pattern) for pattern in include) or any(fnmatchcase(name, p) for p in exclude):
        raise NotFusable("left out by include or exclude")


def _check_devices(name: str, layer: nn.Module) -> None:
    devices = sorted({str(p.device) for p in layer.parameters() if p.device.type != "meta"})
    if len(devices) > 1:
        raise InputError(f"{name} has weights on {' and '.join(devices)}: move each decoder layer to one device.")
