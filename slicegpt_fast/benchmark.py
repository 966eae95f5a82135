"""Prefill and decode speed of models side by side, under several harnesses, against the floor of the hardware.

A pass reads every weight once and multiplies with it, so it cannot take less than

    floor = max(bytes of weights / read bandwidth, FLOPs / matmul rate)

(the roofline model, Williams et al. 2009). Both rates are measured in the same run, in turn with the models, so that
whatever slows the machine down slows all of them. Left out of bytes and FLOPs are the key-value cache and the attention
scores, whose cost grows with the context: a share of the floor is never flattered.
"""

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import Cache, PreTrainedModel, StaticCache
from transformers.generation.streamers import BaseStreamer

from slicegpt_fast.errors import InputError, reason
from slicegpt_fast.evaluation import flops_per_token, read_bytes, stored_parameters
from slicegpt_fast.kernels.native import cpu_isa

# Bytes to read, far more than caches hold, and the size of a square matmul: both long beside the launch of a kernel.
PROBES = {"cpu": (256 << 20, 2048), "cuda": (4 << 30, 8192)}
COMPILED_VARIANTS = 256  # graphs of one forward that torch may hold: per model, harness and shape


@dataclass(frozen=True)
class Speed:
    """One model under one harness. Shares are of the floor."""

    model: str
    harness: str
    prefill: float  # tokens per second
    decode: float
    prefill_share: float
    decode_share: float
    prefill_seconds: list[float]  # of each turn: one pass over the prompt
    decode_seconds: list[float]  # all the passes of one token per sequence


@dataclass(frozen=True)
class Speeds:
    """What was measured in one run."""

    rows: list[Speed]
    read_bandwidth: float  # bytes per second
    matmul_rate: float  # FLOPs per second
    stored_parameters: dict[str, int]  # by model, like the two below
    read_bytes: dict[str, int]  # weights that a pass reads
    flops_per_token: dict[str, int]
    settings: dict[str, int | str]
    machine: dict[str, str]


# One turn: from a prompt and a number of new tokens to the seconds of the prefill and of all decode steps.
Turn = Callable[[Tensor, int], tuple[float, float]]


@dataclass(frozen=True)
class Passes:
    """A turn of forwards, and the cache that a prompt begins with (None: the model makes one)."""

    prefill: Callable[..., Any]
    decode: Callable[..., Any]
    cache: Callable[[], Cache | None]

    def __call__(self, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
        cache = self.cache()
        begin = now(prompt.device)
        output = self.prefill(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        prefilled = now(prompt.device)
        for _ in range(new_tokens):
            token = output.logits[:, -1:].argmax(-1)
            output = self.decode(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        return prefilled - begin, now(prompt.device) - prefilled


@dataclass(frozen=True)
class Generate:
    """A turn of ``model.generate``, greedy: everything that a user of it waits for."""

    model: PreTrainedModel

    def __call__(self, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
        clock = Clock(prompt.device)
        count = new_tokens + 1  # the prefill gives the first
        options = dict(max_new_tokens=count, min_new_tokens=count, do_sample=False, num_beams=1, pad_token_id=0)
        self.model.generate(  # type: ignore[operator]
            prompt, attention_mask=torch.ones_like(prompt), streamer=clock, **options
        )
        begin, first, *_, last = clock.times
        return first - begin, last - first


class Clock(BaseStreamer):
    """When ``generate`` began, and when each new token came."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(now(self._device))

    def end(self) -> None:
        pass


def _eager(model: PreTrainedModel, length: int) -> Turn:
    return Passes(model, model, lambda: None)


def _compile(model: PreTrainedModel, length: int) -> Turn:
    compiled = torch.compile(model, fullgraph=True)
    return Passes(compiled, compiled, lambda: None)


def _static(model: PreTrainedModel, length: int) -> Turn:
    static = StaticCache(model.config, max_cache_len=length)

    def emptied() -> Cache:
        static.reset()
        return static

    return Passes(model, torch.compile(model, fullgraph=True, mode="reduce-overhead"), emptied)


# "static" is what generate(cache_implementation="static") runs: only its decode steps are compiled.
HARNESSES: dict[str, Callable[[PreTrainedModel, int], Turn]] = {
    "eager": _eager,
    "generate": lambda model, length: Generate(model),
    "compile": _compile,
    "static": _static,
}


@torch.no_grad()
def benchmark(
    models: Mapping[str, PreTrainedModel],
    prompt: Tensor,
    *,
    new_tokens: int = 32,
    harnesses: Sequence[str] = ("eager",),
    rounds: int = 5,
    progress: bool = False,
) -> Speeds:
    """Prefill and decode speed of each model under each harness.

    All take turns; each figure is the median of ``rounds`` turns, after one to warm up and compile.

    Args:
        models: what to compare, by name; of one dtype and on one device.
        prompt: token ids [B, T]; prefill is one pass over all of them that gives the last position's logits.
        new_tokens: decode is that many passes over [B, 1] after the prompt, greedy, with a key-value cache.
        harnesses: "eager" (forwards), "generate" (the model's generate, whole), "compile" (torch.compile, growing
            cache), "static" (compiled decode steps, static cache).
        rounds: timed turns of each.
        progress: show a progress bar.

    Raises:
        InputError: an unknown harness, one that cannot run a model, or more tokens than a model has positions.
    """
    length = prompt.shape[1] + new_tokens
    _check(models, harnesses, prompt.shape[1], new_tokens)
    first = next(iter(models.values()))
    prompt = prompt.to(first.device)
    contenders = {
        (name, harness): HARNESSES[harness](model, length) for harness in harnesses for name, model in models.items()
    }
    seconds, rates = _take_turns(contenders, prompt, first.dtype, new_tokens, rounds, progress=progress)
    bandwidth, rate = (statistics.median(each) for each in zip(*rates, strict=True))
    return Speeds(
        rows=[
            _speed(name, harness, models[name], seconds[name, harness], prompt, new_tokens, bandwidth, rate)
            for name, harness in contenders
        ],
        read_bandwidth=bandwidth,
        matmul_rate=rate,
        stored_parameters={name: stored_parameters(model) for name, model in models.items()},
        read_bytes={name: read_bytes(model) for name, model in models.items()},
        flops_per_token={name: flops_per_token(model) for name, model in models.items()},
        settings={
            "batch": prompt.shape[0],
            "prompt": prompt.shape[1],
            "new_tokens": new_tokens,
            "rounds": rounds,
            "dtype": str(first.dtype).removeprefix("torch."),
        },
        machine=machine(first.device),
    )


def _check(models: Mapping[str, PreTrainedModel], harnesses: Sequence[str], prompt: int, new_tokens: int) -> None:
    """Raise InputError for an unknown harness, or more tokens than a model has positions."""
    for name in harnesses:
        if name not in HARNESSES:
            raise InputError(f"harness is {name!r}; it must be one of {', '.join(HARNESSES)}.")
    for model in models.values():
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions and prompt + new_tokens > positions:
            raise InputError(
                f"a prompt of {prompt} and {new_tokens} new tokens are more than the model's {positions} positions: "
                "lower one of them."
            )


def _take_turns(
    contenders: Mapping[tuple[str, str], Turn],
    prompt: Tensor,
    dtype: torch.dtype,
    new_tokens: int,
    rounds: int,
    *,
    progress: bool,
) -> tuple[dict[tuple[str, str], list[tuple[float, float]]], list[tuple[float, float]]]:
    """Return the seconds of each contender's prefill and decode steps, and the machine's rates, of every round."""
    seconds: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in contenders}
    rates: list[tuple[float, float]] = []
    with torch._dynamo.config.patch(recompile_limit=COMPILED_VARIANTS):  # type: ignore[attr-defined]
        for turn in tqdm(range(rounds + 1), desc="speed", unit="round", disable=not progress):
            measured = machine_rates(prompt.device, dtype)
            rates += [measured] if turn else []
            for (name, harness), contender in contenders.items():
                try:
                    taken = contender(prompt, new_tokens)
                except Exception as error:
                    raise InputError(
                        f"the {harness} harness cannot run the {name} model ({reason(error)}): leave that harness out."
                    ) from error
                seconds[name, harness] += [taken] if turn else []
    return seconds, rates


def _speed(
    name: str,
    harness: str,
    model: PreTrainedModel,
    seconds: Sequence[tuple[float, float]],
    prompt: Tensor,
    new_tokens: int,
    bandwidth: float,
    rate: float,
) -> Speed:
    """Return the medians of one contender's rounds, against the floor at these rates."""
    prefill, decode = ([taken[part] for taken in seconds] for part in (0, 1))
    batch = prompt.shape[0]
    per_prefill, per_step = statistics.median(prefill), statistics.median(decode) / new_tokens
    return Speed(
        model=name,
        harness=harness,
        prefill=prompt.numel() / per_prefill,
        decode=batch / per_step,
        prefill_share=floor_seconds(model, prompt.numel(), batch, bandwidth, rate) / per_prefill,
        decode_share=floor_seconds(model, batch, batch, bandwidth, rate) / per_step,
        prefill_seconds=prefill,
        decode_seconds=decode,
    )


def floor_seconds(model: PreTrainedModel, tokens: int, scored: int, bandwidth: float, rate: float) -> float:
    """The least a pass can take.

    Args:
        model: its weights are read once.
        tokens: how many go through the decoder layers.
        scored: how many go through the head.
        bandwidth: bytes per second.
        rate: FLOPs per second.
    """
    head = 2 * model.get_output_embeddings().weight.numel()  # type: ignore[union-attr,operator]
    flops = tokens * (flops_per_token(model) - head) + scored * head
    return max(read_bytes(model) / bandwidth, flops / rate)


def machine_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes per second of reading memory, and FLOPs per second of a large square matmul in ``dtype``; random data."""
    data, a, b = _probes(device, dtype)
    read, matmul = _best_seconds(data.sum, device), _best_seconds(lambda: F.linear(a, b), device)
    return data.nbytes / read, 2 * len(a) ** 3 / matmul


@cache
def _probes(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """What machine_rates reads, and what it multiplies."""
    read, size = PROBES.get(device.type, PROBES["cpu"])
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return torch.randn(read // 4, device=device, dtype=torch.float32), a, b


def machine(device: torch.device) -> dict[str, str]:
    """What a figure belongs to: processor, threads, versions, date."""
    cuda = device.type == "cuda"
    return {
        "processor": torch.cuda.get_device_name(device) if cuda else f"{_cpu_name()} ({cpu_isa()})",
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": date.today().isoformat(),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def _best_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The shortest of three calls, after one to warm up."""
    times = []
    for _ in range(4):
        begin = now(device)
        call()
        times.append(now(device) - begin)
    return min(times[1:])


def now(device: torch.device) -> float:
    """Seconds on a clock that waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
