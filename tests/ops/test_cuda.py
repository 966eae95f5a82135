"""The cuda backend without a GPU: what it refuses, and that its calls arrive in the native launchers as they should."""

import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from slicegpt_fast import _C, native, tuned
from slicegpt_fast.ops import cuda
from slicegpt_fast.ops.dispatch import AUTO, OPS, Op, Request
from slicegpt_fast.ops.norm_linear import ACTIVATIONS

HEADER = Path(__file__).parents[2] / "csrc/slicegpt_fast.h"
BUILD = native.build_info()
with_cuda = pytest.mark.skipif(BUILD.cuda_compiler is None, reason="built without CUDA")
with_hopper = pytest.mark.skipif("90a" not in BUILD.cuda_archs, reason="built without 90a")


def test_auto_takes_nothing_unmeasured(cache, monkeypatch):
    """Nor does the table that is shipped hold anything until a GPU was measured."""
    monkeypatch.setattr(Request, "capability", property(lambda self: (9, 0)))
    monkeypatch.setattr(Op, "refusal", lambda self, backend, request: None)
    monkeypatch.setattr(tuned, "gpu_name", lambda device: "NVIDIA H200")
    rules = [rule for rule in AUTO if "cuda" in rule.backends]
    assert rules
    for rule in rules:
        request = Request(rule.op, torch.device("cuda"), torch.bfloat16, rule.regime, (8, 64, 64))
        assert OPS[rule.op].choose("auto", request) == "reference"


def test_codes_are_those_of_the_header():
    codes = {name: int(value) for name, value in re.findall(r"SGF_(\w+) = (-?\d+),", HEADER.read_text())}
    assert {str(dtype).removeprefix("torch.").upper(): code for dtype, code in cuda.DTYPES.items()} == {
        name: codes[name] for name in ("FLOAT32", "FLOAT16", "BFLOAT16", "FLOAT64")
    }
    assert {(name or "no_activation").upper(): code for name, code in cuda.ACTIVATIONS.items()} == {
        name: codes[name] for name in ("NO_ACTIVATION", "RELU", "GELU", "GELU_TANH", "SILU_GATE")
    }
    assert cuda.ACTIVATIONS.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize(
    ("op", "regime", "device", "capability", "operand", "build", "message"),
    [
        ("norm_linear", "decode", "cuda", (8, 0), torch.float16, ("nvcc", ("80",)), None),
        ("residual_linear", "decode", "cuda", (9, 0), torch.bfloat16, ("nvcc", ("80", "90a")), None),
        ("covariance_", "tall", "cuda", (9, 0), torch.bfloat16, ("nvcc", ("80", "90a")), None),
        ("norm_linear", "decode", "cuda", (9, 0), torch.float16, (None, ()), "built without CUDA"),
        ("norm_linear", "decode", "cpu", (0, 0), torch.float16, ("nvcc", ("80",)), "not on cpu"),
        ("norm_linear", "decode", "cuda", (7, 5), torch.float16, ("nvcc", ("80",)), "capability 8.0"),
        ("norm_linear", "decode", "cuda", (8, 0), torch.float32, ("nvcc", ("80",)), "no torch.float32 kernel"),
        ("residual_linear", "prefill", "cuda", (9, 0), torch.float16, ("nvcc", ("80",)), "more than 16 rows"),
        ("covariance_", "tall", "cuda", (8, 0), torch.float16, ("nvcc", ("80", "90a")), "9.0 only"),
        ("covariance_", "tall", "cuda", (9, 0), torch.float16, ("nvcc", ("80",)), "without the architecture 90a"),
    ],
)
def test_refusals(op, regime, device, capability, operand, build, message, monkeypatch):
    monkeypatch.setattr(Request, "capability", property(lambda self: capability))
    monkeypatch.setattr(cuda, "build_info", lambda: SimpleNamespace(cuda_compiler=build[0], cuda_archs=build[1]))
    refusal = OPS[op].backends["cuda"].refuses(Request(op, torch.device(device), operand, regime, (8, 64, 64)))
    assert refusal is None if message is None else message in refusal


@pytest.fixture
def on_host(monkeypatch):
    """Lets the adapter run on host tensors, as far as the launcher's check of where they lie."""
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(cuda, "on", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))


def refuses_host_memory():
    """Without a driver the CUDA runtime says so; with one, host memory is not on its device."""
    return pytest.raises((RuntimeError, ValueError), match=r"CUDA driver|CUDA-capable|current CUDA device")


@with_cuda
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_norm_linear_reaches_the_device_check(activation, on_host):
    h, weight, bias = torch.zeros(3, 40).half(), torch.zeros(88, 40).half(), torch.zeros(80).half()
    for sumsq in (None, torch.ones(3)):
        with refuses_host_memory():
            cuda.norm_linear(h, weight, bias, 1e-5, 48, sumsq, activation, 8)


@with_cuda
@pytest.mark.parametrize("shortcut", ["absent", "dense", "transposed", "low rank"])
def test_residual_linear_reaches_the_device_check(shortcut, on_host):
    a, weight, h, S = (torch.zeros(shape).bfloat16() for shape in ((9, 2048), (64, 2048), (9, 64), (64, 64)))
    rest = {"absent": (h, None, None), "dense": (None, h, S), "transposed": (None, h, S.T), "low rank": (h, h, S)}
    with refuses_host_memory():
        cuda.residual_linear(a, weight, None, *rest[shortcut])


@with_hopper
@pytest.mark.parametrize("extras", [False, True])
def test_covariance_reaches_the_device_check(extras, on_host):
    x, acc = torch.zeros(70, 40).half(), torch.zeros(40, 40).double()
    with refuses_host_memory():
        cuda.covariance_(acc, x, *((torch.ones(70), torch.ones(70) > 0) if extras else (None, None)))


@with_cuda
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"M": 17}, "does not take these sizes"),
        ({"M": 0}, "does not take these sizes"),
        ({"K": 0}, "does not take these sizes"),
        ({"dtype": 0}, "does not take these sizes"),
        ({"activation": 5}, "does not take these sizes"),
        ({"scaled": 7, "activation": 4}, "does not take these sizes"),
        ({"y": 0}, "null pointer"),
        ({"plan": (4, 0, 0)}, "workspace or the counters"),
        ({"plan": (4, 1 << 20, 1 << 20)}, "workspace or the counters"),
    ],
)
def test_launcher_refuses(change, message):
    arguments = dict(
        h=256, stride_h=8, weight=256, stride_weight=8, bias=0, sumsq=0, y=256, stride_y=8, M=2, scaled=8, unscaled=0,
        K=8, eps=0.0, inverse_width=1.0, activation=0, dtype=1, plan=(1, 0, 0), workspace=0, counters=0, stream=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        _C.cuda_norm_linear(*(arguments | change).values())


@with_cuda
def test_plans_fill_the_gpu():
    splits, workspace, counters = _C.cuda_residual_linear_plan(1, 3072, 11008, 3072, 132)
    tiles = 3072 // 64
    assert 132 <= tiles * splits <= 264
    assert counters == tiles + 1
    assert workspace == tiles * splits * 8 * 65 + tiles * 8
    assert _C.cuda_norm_linear_plan(16, 12288, 64, 3072, 0, 132)[0] == 1
