"""Whole models with random weights: prefill and decode; slicing, its stages, and how its cost grows with the work."""

import copy
import ctypes
import gc
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from timing import DEVICE, MACHINE, Found, Times, random
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PhiConfig, PreTrainedConfig, PreTrainedModel

from slicegpt_fast import InputError, load_model, patch_model, save_model
from slicegpt_fast.benchmark import Speeds, benchmark, now
from slicegpt_fast.ops.dispatch import use_backend
from slicegpt_fast.slicing import SliceOptions, SlicePlan, apply_bases, bases, block_parameters, make_plan
from slicegpt_fast.slicing.layers import narrow_


def llama(width: int, mlp: int, layers: int, heads: int, keys: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
    )


GEOMETRIES: dict[str, PreTrainedConfig] = {
    "SmolLM2-135M": llama(576, 1536, 30, 9, 3, 49152),
    "Llama-2-7B": llama(4096, 11008, 32, 32, 32, 32000),
    "Llama-3-8B": llama(4096, 14336, 32, 32, 8, 128256),
    "OPT-6.7B": OPTConfig(
        hidden_size=4096, word_embed_proj_dim=4096, ffn_dim=16384, num_hidden_layers=32, num_attention_heads=32
    ),
    "Phi-2": PhiConfig(
        hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32, vocab_size=51200
    ),
}
if MACHINE == "tiny":
    GEOMETRIES["Llama-2-7B"] = llama(64, 128, 2, 4, 2, 97)
KEPT = 0.75  # of the decoder blocks' stored parameters
MODELS = {"cuda": list(GEOMETRIES)[1:], "cpu": list(GEOMETRIES)[:1], "tiny": ["Llama-2-7B"]}[MACHINE]
BACKENDS = {"cpu": ("auto",)}.get(MACHINE, ("auto", "cuda", "triton", "reference"))  # of the patched model
BATCHES = {"cuda": (1, 8), "cpu": (1,), "tiny": (1, 2)}[MACHINE]
HARNESSES = {"cuda": ("eager", "static"), "cpu": ("eager", "generate"), "tiny": ("eager", "static")}[MACHINE]
DTYPES = {"cuda": ["bfloat16"], "cpu": ["bfloat16", "float32"], "tiny": ["float16"]}[MACHINE]
PROMPT, NEW_TOKENS, ROUNDS = {"cuda": (1984, 64, 5), "cpu": (512, 8, 5), "tiny": (20, 2, 1)}[MACHINE]

# What the layers keep of SmolLM2-135M cut to 0.8 of its blocks: channels, in steps of 32, and values, in steps of 8.
CHANNELS = [48, 48, 48, 47, 46, 44, 42, 42, 42, 40, 39, 48, 27, 23, 19, 20, 20, 19, 24, 25, 34, 32, 38, 38, 39, 39, 39]
CHANNELS += [42, 48, 48]
VALUES = [2, 8, 8, 8, 8, 7, 6, 3, 4, 6, 8, 8, 7, 8, 5, 4, 7, 6, 5, 7, 4, 6, 8, 8, 6, 6, 5, 7, 4, 8]
PADDED = 128  # what channels are rounded up to where kernels have one tile

# Dtype; hidden size, layers, tokens of what is sliced.
# On a GPU the kernels take half precision alone.
SLICED = {"cuda": "bfloat16", "cpu": "float32", "tiny": "float32"}[MACHINE]
BASE = {"cuda": (2048, 4, 16384), "cpu": (256, 4, 2048), "tiny": (64, 1, 512)}[MACHINE]
GROWTH = {"base": (1, 1, 1), "2 x width": (2, 1, 1), "2 x layers": (1, 2, 1), "2 x tokens": (1, 1, 2)}
SLICES = {"cuda": 2, "cpu": 4, "tiny": 1}[MACHINE]  # rounds
STAGES = ("forward", "covariance", "eigendecomposition", "rotation", "I/O")


def random_model(config: PreTrainedConfig, dtype: str) -> PreTrainedModel:
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


class Stopwatch:
    """Seconds spent in each stage of slicing."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def __call__(self, stage: str, within: str | None = None) -> Iterator[None]:
        """Adds what passes inside to ``stage`` and takes it from the stage around it."""
        begin = now(DEVICE)
        yield
        passed = now(DEVICE) - begin
        self.seconds[stage] += passed
        if within:
            self.seconds[within] -= passed

    def timed(self, function: Callable[..., Any], stage: str, within: str) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            with self(stage, within):
                return function(*arguments)

        return run


def slice_once(model: PreTrainedModel, calibration: list[torch.Tensor], folder: Path) -> dict[str, float]:
    """Slices a model to three quarters, saves and loads the result; seconds of each stage."""
    watch = Stopwatch()
    with ExitStack() as stack:
        for name, stage in (("covariance_", "covariance"), ("principal_components", "eigendecomposition")):
            timed = watch.timed(getattr(bases, name), stage, "forward")
            stack.enter_context(patch.object(bases, name, timed))
        with watch("forward"):
            found = bases.find_bases(model, calibration, make_plan(model, SliceOptions(sparsity=0.25)), progress=False)
    with watch("rotation"):
        sliced = apply_bases(model, found, progress=False)
    with watch("I/O"):
        save_model(sliced, folder)
        load_model(folder)
    shutil.rmtree(folder)
    return watch.seconds


def memory(most: bool) -> int:
    """Bytes held on the GPU, or resident in this process: now, or at most since forget_peak."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() if most else torch.cuda.memory_allocated()
    field = "VmHWM" if most else "VmRSS"
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def forget_peak() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is not held
        Path("/proc/self/clear_refs").write_text("5")


@pytest.mark.parametrize("growth", GROWTH)
def bench_slicing(record, growth, tmp_path):
    """Llama, a basis per norm; the baseline takes the reference's covariances. Peak: bytes beyond the model."""
    width, layers, tokens = (size * times for size, times in zip(BASE, GROWTH[growth], strict=True))
    torch.manual_seed(0)
    model = random_model(llama(width, 3 * width, layers, width // 64, width // 64, 8192), SLICED)
    calibration = list(torch.randint(8192, (tokens // 512, 1, 512)))

    def measuring() -> Found:
        times: Times = {"auto": [], "reference": []}
        stages, peak = dict.fromkeys(STAGES, 0.0), 0
        for _ in range(SLICES):
            for backend in times:
                forget_peak()
                before = memory(most=False)
                with use_backend(backend):
                    seconds = slice_once(model, calibration, tmp_path / "sliced")
                times[backend].append([sum(seconds.values())])
                if backend == "auto":
                    stages, peak = seconds, max(peak, memory(most=True) - before)
        shown = {"width": width, "layers": layers, "tokens": tokens}
        shown |= {stage: f"{stages[stage] / sum(stages.values()):.0%}" for stage in STAGES}
        shown |= {"peak MB": round(peak / 1e6)}
        return times, {"peak_bytes": peak, "stages": stages, "shown": shown}

    record(measuring)


def narrowed(dense: PreTrainedModel, plan: SlicePlan) -> PreTrainedModel:
    """A model of the plan's sizes with random weights."""
    model = copy.deepcopy(dense)
    narrow_(model, plan)
    for module in model.modules():
        for name, narrow in list(module.named_parameters(recurse=False)):
            if narrow.is_meta:
                weight = random(*narrow.shape, dtype=str(narrow.dtype).removeprefix("torch."))
                setattr(module, name, nn.Parameter(weight))
    return model


@cache
def speeds(geometry: str, dtype: str, backend: str, batch: int, harness: str) -> Speeds | str:
    """Dense, sliced (shared basis) and patched side by side, or why ``backend`` cannot run."""
    torch._dynamo.reset()  # frees the models before these, and their CUDA graphs
    gc.collect()
    torch.manual_seed(0)
    dense = random_model(GEOMETRIES[geometry], dtype)
    sliced = narrowed(dense, make_plan(dense, SliceOptions(target_params=KEPT, basis="shared")))
    try:
        patched = patch_model(copy.deepcopy(sliced), backend=backend, strict=True)
    except InputError as refusal:
        return str(refusal)
    models = {"dense": dense, "sliced": sliced, "patched": patched}
    prompt = torch.randint(dense.config.vocab_size, (batch, PROMPT))
    return benchmark(models, prompt, new_tokens=NEW_TOKENS, harnesses=[harness], rounds=ROUNDS)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("harness", HARNESSES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geometry", MODELS)
def bench_end_to_end(record, geometry, dtype, harness, backend, batch, phase):
    if geometry == "OPT-6.7B" and harness == "static":
        pytest.skip("transformers' OPT cannot be compiled whole with a static cache")
    found = speeds(geometry, dtype, backend, batch, harness)
    if isinstance(found, str):
        pytest.skip(found)

    def measuring() -> Found:
        rows = {row.model: row for row in found.rows}
        models = ("patched", "sliced", "dense")
        times: Times = {name: [[turn] for turn in getattr(rows[name], f"{phase}_seconds")] for name in models}
        tokens = batch * (PROMPT if phase == "prefill" else NEW_TOKENS)
        patched = rows["patched"]
        return times, {
            "tokens": tokens,
            "floor": tokens / getattr(patched, phase) * getattr(patched, f"{phase}_share"),
            "read_bandwidth": found.read_bandwidth,
            "matmul_rate": found.matmul_rate,
        }

    record(measuring)


@pytest.mark.skipif(MACHINE != "cpu", reason="the sizes are those of a model for CPUs")
@pytest.mark.parametrize("dtype", DTYPES)
def bench_widths(record, dtype):
    """Decoding with sizes that differ from layer to layer, against equal ones, padded ones, and none cut."""
    torch.manual_seed(0)
    dense = random_model(GEOMETRIES["SmolLM2-135M"], dtype)
    whole = make_plan(dense, SliceOptions(sparsity=0))
    channels, values = tuple(32 * each for each in CHANNELS), tuple(8 * each for each in VALUES)
    mean = round(sum(CHANNELS) / len(CHANNELS)) * 32, round(sum(VALUES) / len(VALUES)) * 8

    def cut(channels: tuple[int, ...], values: tuple[int, ...]) -> PreTrainedModel:
        return narrowed(dense, replace(whole, basis=None, channels=channels, values=values))

    made = {
        "cut": cut(channels, values),
        "equal sizes": cut(*((each,) * len(channels) for each in mean)),
        "padded": cut(tuple(-(-each // PADDED) * PADDED for each in channels), (64,) * len(values)),
        "dense": dense,
    }
    stored = {name: f"{block_parameters(model) / block_parameters(dense):.3f}" for name, model in made.items()}
    models = {name: patch_model(model, strict=True) for name, model in made.items()}
    prompt = torch.randint(dense.config.vocab_size, (1, PROMPT))

    def measuring() -> Found:
        found = benchmark(models, prompt, new_tokens=NEW_TOKENS, harnesses=["eager"], rounds=ROUNDS)
        times: Times = {row.model: [[turn] for turn in row.decode_seconds] for row in found.rows}
        shown = {f"stored, {name}": share for name, share in stored.items()}
        shown |= {f"read, {name}": f"{found.read_bytes[name] / found.read_bytes['dense']:.3f}" for name in made}
        return times, {"tokens": NEW_TOKENS, "shown": shown}

    record(measuring)
