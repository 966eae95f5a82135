"""``patch_model`` holds each fused part against the code that it replaces, on a few tokens.

What the guards know of is a list, and lists of what can go wrong are never complete. So before anything is replaced one
short forward records what each decoder layer and the head are given and what they make of it. Their fused forms then
get the same inputs. A layer whose result differs is searched sublayer by sublayer; what differs stays unfused.

Whole decode steps are then held against the layers one by one, with a cache.

It costs two forwards of 12 tokens in all, and four shorter ones: 0.5 s for a model of 135M parameters on one core of a
busy server CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from slicegpt_fast.architectures import evaluating
from slicegpt_fast.errors import reason
from slicegpt_fast.patching.guards import forward_slot
from slicegpt_fast.patching.head import FusedHead
from slicegpt_fast.patching.layers import FusedLayer
from slicegpt_fast.patching.steps import DecodeSteps
from slicegpt_fast.slicing.layers import run_sublayer

BATCH, LENGTH = 2, 6  # tokens of the check, the second sequence padded on its left


@dataclass
class Call:
    """What a module was given, and what it made of it."""

    positional: tuple[Any, ...]
    named: dict[str, Any]
    output: Tensor


def record(model: PreTrainedModel, modules: Iterable[nn.Module]) -> dict[nn.Module, Call] | str:
    """What each of ``modules`` does in one short forward of ``model``, or why there is none."""
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        return "weights are absent"
    calls: dict[nn.Module, Call] = {}
    slots = [(module, forward_slot(module)) for module in modules]
    before = [module.__dict__.get(slot) for module, slot in slots]
    ids, mask = _few_tokens(model)
    try:
        for module, slot in slots:
            setattr(module, slot, _recording(calls, module, getattr(module, slot)))
        with evaluating(model), torch.no_grad():
            model(ids, attention_mask=mask, use_cache=False)
    except Exception as error:
        return f"the model does not run on a few tokens ({reason(error)})"
    finally:
        for (module, slot), forward in zip(slots, before, strict=True):
            delattr(module, slot)
            if forward is not None:
                setattr(module, slot, forward)
    return calls


def _few_tokens(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Token ids [BATCH, LENGTH] and their attention mask."""
    device = next(model.parameters()).device
    ids = (torch.arange(BATCH * LENGTH, device=device) % model.config.vocab_size).view(BATCH, LENGTH)
    mask = torch.ones_like(ids)
    mask[1:, :2] = 0
    return ids, mask


def _recording(calls: dict[nn.Module, Call], module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def recording(*positional: Any, **named: Any) -> Any:
        kept = tuple(value.clone() if isinstance(value, Tensor) else value for value in positional)
        output = forward(*positional, **named)
        calls[module] = Call(kept, named, _stream(output).clone())
        return output

    return recording


def _stream(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def compare(
    model: PreTrainedModel, layers: Iterable[FusedLayer], head: FusedHead | None, calls: dict[nn.Module, Call]
) -> None:
    """Refuse each fused part that does not compute what its module did in ``calls``."""
    with evaluating(model):
        for layer in layers:
            call = calls.get(layer.layer)
            if call is None or not call.output.isfinite().all():
                continue
            output = _stream(layer.forward(*call.positional, **call.named))
            if differs(output, call.output, call.positional[0]):
                _search(layer, call)
        call = None if head is None else calls.get(head.module)
        if head is not None and call is not None and call.output.isfinite().all():
            output = head.forward(*call.positional, **call.named)
            head.refused = differs(output, call.output, torch.zeros_like(call.output))


def _search(layer: FusedLayer, call: Call) -> None:
    """Refuse the sublayers of a layer that differ, each on the unfused result of those before it."""
    h, *positional = call.positional
    named = call.named | dict(zip(layer.architecture.positional, positional, strict=False))
    for sublayer in layer.architecture.sublayers:
        expected, _ = run_sublayer(layer.layer, sublayer, h, **named)
        fused = layer.sublayers.get(sublayer.name)
        if fused is not None and fused.changed() is None and fused.weights.refresh() is None:
            fused.refused = differs(fused(h, None, named)[0], expected, h)
        h = expected
    reason = differs(h, call.output, call.positional[0])  # the layer is not the sum of its sublayers
    if reason is not None:
        layer.refused = reason
        for fused in layer.sublayers.values():
            fused.refused = reason


@torch.no_grad()
def compare_steps(model: PreTrainedModel, steps: DecodeSteps) -> None:
    """Refuse whole steps where they do not give what the layers give one by one, with a cache, twice in a row."""
    ids, mask = _few_tokens(model)

    def last_states() -> Tensor:
        cache = DynamicCache(config=model.config)
        steps.module(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache)
        return cast(Tensor, steps.module(ids[:, -1:], attention_mask=mask, past_key_values=cache).last_hidden_state)

    with evaluating(model):
        steps.refused = "they are being checked"
        expected = last_states()
        steps.refused = None
        if expected.isfinite().all():
            rounding = torch.finfo(expected.dtype).eps * 2 * steps.count**0.5
            steps.refused = differs(last_states(), expected, torch.zeros_like(expected), rounding)


def differs(output: Tensor, expected: Tensor, h: Tensor, rounding: float = 0.0) -> str | None:
    """A sentence where ``output`` is further from ``expected`` than rounding explains, given that h was added to.

    ``rounding``: the relative error that several layers may add to that of one.
    """
    change = expected - h if h.shape == expected.shape else expected
    eps = torch.finfo(expected.dtype).eps
    error, norms = torch.dist(output.double(), expected.double()), (change.double().norm(), expected.double().norm())
    if error <= (1e-3 + 4 * (eps + rounding)) * norms[0] + eps * norms[1]:
        return None
    return f"on a few tokens its result differs by {float(error / norms[0]):.1g} of what it adds to the stream"
