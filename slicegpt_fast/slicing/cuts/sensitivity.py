"""What errors cost: statistics of one forward and backward pass over calibration text, of activations' gradients only.

Let x [F] be the input of a writer (a weight W [F, D] whose output is added to the stream) and g [D] the gradient of the
summed token loss at its output, which is the gradient at the stream behind its sublayer. To second order, with the
expected outer product of gradients as the curvature and inputs independent of gradients, a change dW costs per token

    1/2 E (g^T dW^T x)^2  ~  1/2 tr(dW^T C dW J),    J = mean g g^T,    C = 1/2 mean x x^T + s/2 sum |g|^2 x x^T

The second half of C counts a token the more, the more its error matters; s brings it to the mean diagonal of the first.
At a norm site the same holds with n, the normalised stream before the norm's weight and bias: an error of covariance E
in what its readers are given costs 1/2 tr(G E), where G is the covariance of the gradient at n.

All in fp64: the sums of a writer, of each expert of a mixture, take 8 (2 F^2 + D^2) bytes, two matrices [F, F] until
the mean diagonals are known, and those of a norm 16 D^2. C takes 8 F^2 of host memory until the cut is made, twice that
while plans are compared. Where memory is short, groups of layers have their statistics taken one after another, in a
pass each, which changes none of them. For 32 layers with D = 4096 and F = 14336 (Llama-3-8B) the sums take 4.4 GB per
layer, the norms' 17 GB in all, C 57 GB.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from slicegpt_fast.architectures import AXES, Axis, Decoder, Weight, at, evaluating, weights
from slicegpt_fast.errors import InputError
from slicegpt_fast.ops.covariance import covariance_
from slicegpt_fast.slicing.batches import Batch, checked, pieces
from slicegpt_fast.slicing.layers import norm_eps, rstd
from slicegpt_fast.slicing.storage import IN_MEMORY

Hook = Callable[[Tensor | None, nn.Module, tuple[Tensor, ...], Tensor], None]  # a forward hook; first, what counts


@dataclass(frozen=True)
class WriterStatistics:
    """Of one writer, or of one expert's: tokens that are not routed to an expert count as an input of zero.

    Attributes:
        inputs: C [F, F] fp64.
        mean: [F] fp64, the mean of x in the weighting of C.
        mass: the sum of that weighting's weights, by which C grows if all inputs are moved.
        gradients: J [D, D] fp64.
    """

    inputs: Tensor
    mean: Tensor
    mass: float
    gradients: Tensor


@dataclass(frozen=True)
class SiteStatistics:
    """Of one norm site, all [D, D] fp64.

    Attributes:
        inputs: mean n n^T.
        gradients: G, the mean outer product of the gradient at n.
    """

    inputs: Tensor
    gradients: Tensor


@dataclass(frozen=True)
class Sensitivity:
    """The statistics of a model.

    Attributes:
        writers: by the writer's path; one for a linear module, one per expert for stacked experts.
        sites: by the norm's path, in the stream's order, the final norm last; where several norms read the stream at
            one site, each of them.
        tokens: how many positions counted.
        loss: the dense model's mean loss over the tokens that were predicted.
    """

    writers: dict[str, tuple[WriterStatistics, ...]]
    sites: dict[str, SiteStatistics]
    tokens: int
    loss: float


def measure_sensitivity(
    model: PreTrainedModel,
    calibration: Iterable[Batch],
    *,
    layers: range | None = None,
    axes: Sequence[Axis] = AXES,
    progress: bool = True,
) -> Sensitivity:
    """Take the statistics of a dense model in one pass over calibration batches.

    Args:
        model: the dense model; unchanged on return.
        calibration: token batches, each a [B, T] (or [T]) integer tensor or a mapping with ``input_ids`` and, where
            there is padding, ``attention_mask``. Padded positions count nowhere.
        layers: the decoder layers to take them of, by default all; the final norm belongs to the last.
        axes: what is to be cut: channels and values need statistics of writers, the stream those of norms.
        progress: show a progress bar over the batches.

    Raises:
        InputError: no token to predict, token ids beyond the vocabulary, or statistics that are not finite.
    """
    decoder = Decoder(model)
    layers = range(len(decoder.layers)) if layers is None else layers
    writers, norms = _taps(decoder, layers, [axis for axis in axes if axis in decoder.architecture.axes])
    hooks = [(tap.module, tap.hook) for tap in chain(writers, norms)]
    tokens, predicted, loss = _backpropagate(decoder, calibration, hooks, layers.start, "sensitivity", progress)
    if not predicted:
        raise InputError("calibration has no token to predict: give sequences of at least two tokens.")
    return Sensitivity(
        {tap.path: tap.statistics(tokens) for tap in writers},
        {tap.path: tap.statistics(tokens) for tap in norms},
        tokens,
        loss / predicted,
    )


def gradient_norms(
    model: PreTrainedModel, modules: Iterable[nn.Module], calibration: Iterable[Batch], *, progress: bool
) -> dict[nn.Module, Tensor]:
    """Return |g| at the output of linear layers, where g is the gradient of the summed token loss, for each position.

    Args:
        model: in memory; unchanged on return.
        modules: its linear layers; those that do not run are not in the result.
        calibration: as of :func:`measure_sensitivity`.
        progress: show a progress bar over the batches.

    Returns:
        [N] fp32 for each module, the positions of all batches one after the other, padding included.

    Raises:
        InputError: token ids beyond the vocabulary, or gradients that are not finite.
    """
    sizes: dict[nn.Module, list[Tensor]] = {}

    def hook(counted: Tensor | None, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        def add(g: Tensor) -> None:
            sizes.setdefault(module, []).append(g.flatten(0, -2).float().norm(dim=1))

        output.register_hook(add)

    decoder = Decoder(model)
    _backpropagate(decoder, calibration, [(module, hook) for module in modules], 0, "gradients", progress)
    found = {module: torch.cat(parts) for module, parts in sizes.items()}
    for module, norms in found.items():
        if not norms.isfinite().all():
            raise _not_finite(next(path for path, each in model.named_modules() if each is module))
    return found


def _backpropagate(
    decoder: Decoder,
    calibration: Iterable[Batch],
    hooks: Sequence[tuple[nn.Module, Hook]],
    start: int,
    description: str,
    progress: bool,
) -> tuple[int, int, float]:
    """Bring the summed token loss of each batch back to the decoder layer ``start``, with the hooks on their modules.

    Returns:
        How many positions count, how many tokens were predicted, and the sum of their losses.
    """
    model = decoder.model
    IN_MEMORY.check(model)
    batches = [piece for batch in checked(calibration, model.config, model.device) for piece in pieces(batch)]
    tokens, predicted, loss = 0, 0, 0.0
    with evaluating(model), _frozen(model), torch.enable_grad():
        for batch in tqdm(batches, desc=description, unit="batch", disable=not progress):
            mask = batch["attention_mask"].bool()
            counted = None if mask.all() else mask.flatten()
            with ExitStack() as handles:
                handles.callback(decoder.layers[start].register_forward_pre_hook(_start_gradients).remove)
                for module, hook in hooks:
                    handles.callback(module.register_forward_hook(partial(hook, counted)).remove)
                summed, number = summed_loss(model, batch, mask)
                summed.backward()
            tokens, predicted, loss = tokens + int(mask.sum()), predicted + number, loss + summed.item()
    return tokens, predicted, loss


def layers_within(decoder: Decoder, start: int, memory: float) -> range:
    """Return the decoder layers from ``start`` on, at least one, whose sums take at most ``memory`` bytes together."""
    for index in range(start, len(decoder.layers)):
        for site, sublayer in decoder.sublayers():
            if site.index == index:
                norms = {branch.norm for branch in sublayer.branches}
                memory -= 16 * decoder.width**2 * len(norms)
                for writer in (w for branch in sublayer.branches for w in weights(site.part, branch.writers)):
                    outputs, inputs = writer.matrix.shape[-2:]
                    memory -= 8 * (2 * inputs**2 + outputs**2) * (writer.matrix.numel() // (outputs * inputs))
        if memory < 0 and index > start:
            return range(start, index)
    return range(start, len(decoder.layers))


class _Sums:
    """The sums behind the statistics of a writer of F inputs and D outputs."""

    def __init__(self, matrix: Tensor) -> None:
        outputs, inputs = matrix.shape
        factory: dict[str, Any] = {"dtype": torch.float64, "device": matrix.device}
        self.rows = 0
        self.inputs, self.input_sum = torch.zeros(inputs, inputs, **factory), torch.zeros(inputs, **factory)
        self.weighted, self.weighted_sum = torch.zeros_like(self.inputs), torch.zeros_like(self.input_sum)
        self.weights = torch.zeros((), **factory)
        self.gradients = torch.zeros(outputs, outputs, **factory)

    def add(self, x: Tensor, g: Tensor, counted: Tensor | None) -> None:
        """Add the rows that count of inputs [N, F] and gradients [N, D]."""
        size = g.float().norm(dim=1)
        covariance_(self.inputs, x, None, counted)
        covariance_(self.weighted, x, size, counted)
        covariance_(self.gradients, g, None, counted)
        x, weight = x.double(), size.double().square()
        if counted is not None:
            x, weight = x[counted], weight[counted]
        self.rows += len(x)
        self.input_sum += x.sum(0)
        self.weighted_sum += weight @ x
        self.weights += weight.sum()

    def statistics(self, path: str, tokens: int) -> WriterStatistics:
        """Return the statistics, J a mean over all ``tokens``; the sums are used up."""
        rows, trace = max(self.rows, 1), self.weighted.trace().item()
        even = 0.5 / rows
        uneven = even * self.inputs.trace().item() / trace if trace > 0 else even
        inputs = self.inputs.mul_(even).add_(self.weighted, alpha=uneven)
        gradients = self.gradients.div_(tokens)
        if not (inputs.diagonal().isfinite().all() and gradients.diagonal().isfinite().all()):
            raise _not_finite(path)
        mean = even * self.input_sum + uneven * self.weighted_sum
        mass = even * self.rows + uneven * self.weights.item()
        return WriterStatistics(inputs, mean, mass, gradients)


class _LinearTap:
    """A writer that is a module of its own."""

    def __init__(self, path: str, writer: Weight) -> None:
        self.path, self.module, self.sums = path, writer.owner, _Sums(writer.matrix)

    def hook(self, counted: Tensor | None, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0].detach().flatten(0, -2)
        output.register_hook(lambda g: self.sums.add(x, g.flatten(0, -2), counted))

    def statistics(self, tokens: int) -> tuple[WriterStatistics, ...]:
        return (self.sums.statistics(self.path, tokens),)


class _ExpertsTap:
    """The writers of stacked experts. What a token's weight in the mixture scales is the input of the writer.

    The experts' code keeps their inputs to itself, so that they are computed again.
    """

    def __init__(self, path: str, writer: Weight) -> None:
        self.path, self.module, self.sums = path, writer.owner, [_Sums(matrix) for matrix in writer.matrix]

    def hook(self, counted: Tensor | None, module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        tokens, chosen, mixture = (argument.detach() for argument in args)

        def add(g: Tensor) -> None:
            g = g.flatten(0, -2)
            for expert, sums in enumerate(self.sums):
                routed = chosen == expert if counted is None else (chosen == expert) & counted[:, None]
                row, slot = torch.where(routed)
                if len(row):
                    gate, up = F.linear(tokens[row], module.gate_up_proj[expert]).chunk(2, dim=-1)
                    sums.add(module.act_fn(gate) * up * mixture[row, slot, None], g[row], None)

        output.register_hook(add)

    def statistics(self, tokens: int) -> tuple[WriterStatistics, ...]:
        return tuple(sums.statistics(self.path, tokens) for sums in self.sums)


class _NormTap:
    """A norm: its output without weight and bias, and the gradient there."""

    def __init__(self, path: str, norm: Any, decoder: Decoder) -> None:
        self.path, self.module, self.centered = path, norm, decoder.architecture.centered
        self.gain = decoder.architecture.gain(norm)
        width, device = decoder.width, decoder.model.device
        self.inputs = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.gradients = torch.zeros_like(self.inputs)

    def hook(self, counted: Tensor | None, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        state = args[0].detach().flatten(0, -2)
        if self.centered:
            state = state - state.mean(-1, keepdim=True)
        scale = rstd(state, state.shape[1], norm_eps(module)).squeeze(1)
        covariance_(self.inputs, state, scale, counted)

        def add(g: Tensor) -> None:
            covariance_(self.gradients, g.flatten(0, -2), None, counted)

        output.register_hook(add)

    def statistics(self, tokens: int) -> SiteStatistics:
        gradients = self.gradients.div_(tokens)
        if self.gain is not None:
            gain = self.gain.detach().double()
            gradients.mul_(gain).mul_(gain[:, None])
        if not (self.inputs.diagonal().isfinite().all() and gradients.diagonal().isfinite().all()):
            raise _not_finite(self.path)
        return SiteStatistics(self.inputs.div_(tokens), gradients)


def _taps(
    decoder: Decoder, layers: range, axes: Sequence[Axis]
) -> tuple[list[_LinearTap | _ExpertsTap], list[_NormTap]]:
    """The writers and the norms of some layers, in the stream's order, as far as cuts along these axes need them."""
    writers: list[_LinearTap | _ExpertsTap] = []
    norms: dict[str, nn.Module] = {}
    for site, branch in ((s, branch) for s, sublayer in decoder.sublayers() for branch in sublayer.branches):
        if site.index not in layers:
            continue
        norms.setdefault(f"{site.path}.{branch.norm}", at(site.part, branch.norm))
        if ("values" if branch.activation is None else "channels") in axes:
            for name in branch.writers:
                for writer in weights(site.part, (name,)):  # none where the layer lacks it
                    tap = _ExpertsTap if writer.matrix.ndim == 3 else _LinearTap
                    writers.append(tap(f"{site.path}.{name}", writer))
    if layers.stop == len(decoder.layers):
        norms[decoder.sites[-1].path] = decoder.final_norm
    return writers, [_NormTap(*norm, decoder) for norm in norms.items() if "stream" in axes]


def summed_loss(model: Any, batch: dict[str, Tensor], mask: Tensor) -> tuple[Tensor, int]:
    """The summed loss of the tokens of a batch that have a predecessor, and how many they are."""
    inputs = dict(batch)
    if not mask.all():
        inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    logits = model(**inputs, use_cache=False).logits
    scored = mask[:, 1:] & mask[:, :-1]
    targets = F.pad(batch["input_ids"][:, 1:].masked_fill(~scored, -100), (0, 1), value=-100)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum")
    return loss, int(scored.sum())


def _start_gradients(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Let gradients begin at the stream that enters the first layer of interest: the parameters have none."""
    return (args[0].detach().requires_grad_(), *args[1:])


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter has a gradient inside; after, each is trained or not as before."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _not_finite(path: str) -> InputError:
    return InputError(
        f"activations or gradients at {path} are not finite: check the weights, or load the model in a wider dtype."
    )
