"""Weights of 8 or 4 bits: a model's matrices rounded one after the other, each to what the rounded ones before it make.

    copy of the model --> tables to 8 bits --> |g| of every token --> sublayer by sublayer, on calibration tokens:
        readers, to what their norm gives --> writers, to what the rounded readers make --> the stream goes on

An error of a matrix W with inputs x costs, to second order and with squared gradients as the curvature, half of
(g^T dW x)^2 per token, where g is the gradient of its loss at the output. So W is rounded in the covariance of |g| x: a
token counts as much as the loss depends on it. Without that, the first token of a text would rule, whose activations
can be a thousand times as large as the others' while little depends on them: SmolLM2-135M cut to 0.8 of its blocks, at
4 bits in groups of 32, comes to 1.20 times its perplexity unweighted and to 1.07 times weighted.

The covariance of one matrix's inputs is in memory at a time, beside the residual stream of the calibration tokens and
one number per token and matrix. Routers, stacked experts, norms and shortcuts stay as they are.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from slicegpt_fast.architectures import Decoder, Site, Weight, evaluating
from slicegpt_fast.errors import InputError
from slicegpt_fast.ops.covariance import covariance_
from slicegpt_fast.quantization import (
    Precision,
    all_linears,
    check_plain,
    forget_ties_,
    quantized_modules,
    readers,
    replace_,
    replace_linear_,
    replace_tables_,
    round_nearest,
    round_with_feedback,
    writers,
)
from slicegpt_fast.quantization.plan import Bits, Group, Method, Rounded, Tables
from slicegpt_fast.slicing.batches import Batch, batch_list
from slicegpt_fast.slicing.cuts.sensitivity import gradient_norms
from slicegpt_fast.slicing.format import SliceConfig, slice_config_of
from slicegpt_fast.slicing.integration import mark_sliced
from slicegpt_fast.slicing.layers import normalise, run_sublayer
from slicegpt_fast.slicing.plan import uncut_plan
from slicegpt_fast.slicing.storage import IN_MEMORY
from slicegpt_fast.slicing.walk import Stream, enter, visit

GROUP: Group = 32  # columns that share a scale at 4 bits, unless another number is asked for

RoundMatrix = Callable[[Tensor, Tensor], Rounded]  # of a matrix [n, k] and the covariance [k, k] of its inputs


def quantize_model(
    model: PreTrainedModel,
    bits: Bits,
    *,
    group: Group | None = None,
    calibration: Iterable[Batch] | None = None,
    method: Method | None = None,
    tables: Tables = 8,
    progress: bool = True,
) -> PreTrainedModel:
    """Return a copy of a causal language model whose weights have 8 or 4 bits.

    The result is a model of the same class: it generates, takes adapters and saves as before, and
    ``AutoModelForCausalLM.from_pretrained`` loads it once ``slicegpt_fast`` is imported. The given model is unchanged.

    Args:
        model: a dense or sliced model of plain linear layers, in fp32, bf16 or fp16.
        bits: of the linear layers that read and write the residual stream: 8 with a scale for each row, or 4 with one
            for each row and group of columns. Routers and stacked experts stay as they are.
        group: 32 (the default), 64 or 128 columns that share a scale at 4 bits.
        calibration: token batches, as for :func:`slicegpt_fast.slice_model`.
        method: ``"gptq"``, with error feedback on the calibration text (arXiv 2210.17323), or ``"nearest"``, which
            takes from the text, if any is given, how much each column counts. By default the first where there is
            text.
        tables: 8, or 16 to leave the embedding table and the head as they are.
        progress: show a progress bar.

    Raises:
        InputError: with one sentence on what to change.
    """
    if bits == 4 and group is None:
        group = GROUP
    if method is None:
        method = "nearest" if calibration is None else "gptq"
    precision = Precision(bits, group, tables, method)
    if method == "gptq" and calibration is None:
        raise InputError("method 'gptq' rounds to calibration text: give calibration, or take method='nearest'.")
    dense = Decoder(model)
    _check(dense)
    batches = None if calibration is None else batch_list(calibration)
    quantised = copy.deepcopy(model)
    tokens = _round_(Decoder(quantised), precision, batches, progress)
    before = slice_config_of(model)
    plan = vars(uncut_plan(dense) if before is None else before.plan())
    calibrated = tokens if before is None else before.calibration_tokens
    mark_sliced(quantised, model, SliceConfig(calibrated, precision=vars(precision), **plan))
    return quantised


def dequantize_model(model: PreTrainedModel, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Give a quantised model ordinary linear layers and tables again, in place, and return it.

    Args:
        model: from :func:`quantize_model` or ``from_pretrained``; adapters may be wrapped around its layers.
        dtype: of the weights; by default the model's.

    Raises:
        InputError: there is nothing quantised in it.
    """
    found = quantized_modules(model)
    if not found:
        raise InputError("the model is not quantised: there is nothing to dequantise.")
    dtype = dtype or model.dtype
    with torch.no_grad():
        for path, module in found.items():
            replace_(model, path, module.ordinary(dtype))
    for each in model.modules():
        if isinstance(each, PreTrainedModel):
            forget_ties_(each)
            _forget_precision(each.config)
    return model


def _forget_precision(config: PreTrainedConfig) -> None:
    """Let a config tell no more than how its model was sliced, if it was."""
    slice_config = slice_config_of(config)
    if slice_config is None:
        return
    del config.quantization_config
    if (plan := slice_config.plan()).cuts:
        config.quantization_config = SliceConfig(slice_config.calibration_tokens, **vars(plan))


def _check(decoder: Decoder) -> None:
    """Raise InputError unless a model can be quantised."""
    block = getattr(decoder.model.config, "quantization_config", None)
    if quantized_modules(decoder.model) or (block is not None and slice_config_of(decoder.model) is None):
        raise InputError("the model is quantised already: quantise the one that it was made from.")
    check_plain(decoder)


@torch.inference_mode(False)  # adapters could not be trained on the biases
@torch.no_grad()
def _round_(decoder: Decoder, precision: Precision, batches: list[Batch] | None, progress: bool) -> int:
    """Round the matrices of a model in place; return on how many tokens."""
    nearest = partial(round_nearest, bits=precision.bits, group=precision.group)
    if precision.tables == 8:
        replace_tables_(decoder, partial(round_nearest, bits=8, group=None), tied=decoder.is_tied)
    if batches is None:
        for layer, path, weight in [*all_linears(decoder)]:
            replace_linear_(layer, path, nearest(weight.matrix))
        return 0

    def weighted(matrix: Tensor, inputs: Tensor) -> Rounded:
        return nearest(matrix, importance=inputs.diagonal())

    feedback: RoundMatrix = partial(round_with_feedback, bits=precision.bits, group=precision.group)
    rounded = {"gptq": feedback, "nearest": weighted}[precision.method]
    decoder = Decoder(decoder.model)  # with the tables that it has now
    linears = [weight.owner for _, _, weight in all_linears(decoder)]
    norms = gradient_norms(decoder.model, linears, batches, progress=progress)
    with evaluating(decoder.model):
        stream = enter(decoder, batches, IN_MEMORY, at_least=1)
        for site in visit(decoder, IN_MEMORY, "quantising", progress=progress):
            if site.sublayer is not None:
                _round_site_(site, stream, norms, rounded)
    return stream.tokens


def _round_site_(site: Site, stream: Stream, norms: dict[nn.Module, Tensor], rounded: RoundMatrix) -> None:
    """Round the readers of a sublayer, then its writers, and bring the stream to the next site."""
    assert site.sublayer is not None
    layer, branches = site.part, site.sublayer.branches
    reading = {
        norm: _merged(readers(layer, b) for b in branches if b.norm == norm) for norm in {b.norm for b in branches}
    }
    scales = {norm: _by_batch(found, norms, stream) for norm, found in reading.items()}
    sums: dict[str, Tensor] = {}
    for index, state in enumerate(stream.states):
        for norm, x in normalise(layer, site.sublayer, state).items():
            if reading[norm]:
                _add(sums, norm, x, scales[norm][index], stream.counted[index])
    for norm, inputs in sums.items():
        _replace_(layer, reading[norm], rounded, inputs)
    writing = _merged(writers(layer, branch) for branch in branches)
    scales = {path: _by_batch({path: weight}, norms, stream) for path, weight in writing.items()}
    sums = {}
    for index, state in enumerate(stream.states if writing else ()):
        with _called(writing) as seen:
            run_sublayer(layer, site.sublayer, state, **stream.layer_arguments[index][site.index])
        for path, x in seen.items():
            _add(sums, path, x, scales[path][index], stream.counted[index])
    for path, inputs in sums.items():
        _replace_(layer, {path: writing[path]}, rounded, inputs)
    for index, state in enumerate(stream.states):
        stream.states[index], _ = run_sublayer(layer, site.sublayer, state, **stream.layer_arguments[index][site.index])


def _by_batch(found: dict[str, Weight], norms: dict[nn.Module, Tensor], stream: Stream) -> list[Tensor | None]:
    """|g| [B * T] of each batch's tokens at the outputs of some linear layers together; None if they did not run."""
    known = [norms[weight.owner] for weight in found.values() if weight.owner in norms]
    if not known:
        return [None] * len(stream.counted)
    return [*torch.stack(known).norm(dim=0).split([state[..., 0].numel() for state in stream.states])]


def _add(sums: dict[str, Tensor], name: str, x: Tensor, scale: Tensor | None, counted: Tensor | None) -> None:
    """Add the covariance of inputs [B, T, F], scaled by [B * T], to those called ``name``."""
    if name not in sums:
        sums[name] = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64, device=x.device)
    covariance_(sums[name], x.flatten(0, -2), scale, counted)


def _replace_(layer: nn.Module, found: dict[str, Weight], rounded: RoundMatrix, inputs: Tensor) -> None:
    """Round linear layers of the same inputs, all rows together."""
    matrices = [weight.matrix for weight in found.values()]
    parts = [each.split([len(matrix) for matrix in matrices]) for each in rounded(torch.cat(matrices), inputs)]
    for path, integers, scales in zip(found, *parts, strict=True):
        replace_linear_(layer, path, (integers.clone(), scales.clone()))


def _merged(parts: Iterable[dict[str, Weight]]) -> dict[str, Weight]:
    return {path: weight for part in parts for path, weight in part.items()}


@contextmanager
def _called(found: dict[str, Weight]) -> Iterator[dict[str, Tensor]]:
    """Inside, the inputs of linear layers, by their path, as they were called last."""
    inputs: dict[str, Tensor] = {}

    def record(path: str, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        inputs[path] = arguments[0]

    with ExitStack() as hooks:
        for path, weight in found.items():
            hooks.callback(weight.owner.register_forward_hook(partial(record, path)).remove)
        yield inputs
