"""The cuda backend: what it refuses, how its calls arrive in the native launchers, and its sums over splits."""

import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from emulator.emulate import emulating
from ops.accuracy import assert_as_good_as_torch, device_of, double, random

from slicegpt_fast import _C
from slicegpt_fast.kernels import measured, native
from slicegpt_fast.kernels.counters import counters
from slicegpt_fast.ops import norm_linear, residual_linear
from slicegpt_fast.ops.backends import cuda
from slicegpt_fast.ops.dispatch import OPS, Op, Request
from slicegpt_fast.ops.norm_linear import ACTIVATE
from slicegpt_fast.ops.norm_linear import reference as norm_reference

HEADER = Path(__file__).parents[2] / "csrc/slicegpt_fast.h"
BUILD = native.build_info()
with_cuda = pytest.mark.skipif(BUILD.cuda_compiler is None, reason="built without CUDA")
with_hopper = pytest.mark.skipif("90a" not in BUILD.cuda_archs, reason="built without 90a")


def test_auto_takes_nothing_unmeasured(cache, monkeypatch):
    """Nor does the table that is shipped hold anything until a GPU was measured."""
    monkeypatch.setattr(Request, "capability", property(lambda self: (9, 0)))
    monkeypatch.setattr(Op, "refusal", lambda self, backend, request: None)
    monkeypatch.setattr(measured, "gpu_name", lambda device: "NVIDIA H200")
    rules = [(op, rule) for op in OPS.values() for rule in op.rules if "cuda" in rule.backends]
    assert rules
    for op, rule in rules:
        request = Request(op.name, torch.device("cuda"), torch.bfloat16, rule.regime, (8, 64, 64))
        assert op.choose("auto", request) == "reference"


def test_codes_are_those_of_the_header():
    codes = {name: int(value) for name, value in re.findall(r"SGF_(\w+) = (-?\d+),", HEADER.read_text())}
    assert {str(dtype).removeprefix("torch.").upper(): code for dtype, code in cuda.DTYPES.items()} == {
        name: codes[name] for name in ("FLOAT32", "FLOAT16", "BFLOAT16", "FLOAT64")
    }
    assert {(name or "no_activation").upper(): code for name, code in cuda.ACTIVATIONS.items()} == {
        name: codes[name] for name in ("NO_ACTIVATION", "RELU", "GELU", "GELU_TANH", "SILU_GATE")
    }
    assert cuda.ACTIVATIONS.keys() == ACTIVATE.keys()


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
        ("norm_linear", "prefill", "cuda", (9, 0), torch.bfloat16, ("nvcc", ("80", "90a")), None),
        ("norm_linear", "prefill", "cuda", (8, 0), torch.float16, ("nvcc", ("80", "90a")), "9.0 only"),
        ("residual_linear", "prefill", "cuda", (10, 0), torch.float16, ("nvcc", ("80", "90a")), "9.0 only"),
        (
            "residual_linear",
            "prefill",
            "cuda",
            (9, 0),
            torch.float16,
            ("nvcc", ("80",)),
            "without the architecture 90a",
        ),
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


ROWS = [pytest.param(9, marks=with_cuda), pytest.param(40, marks=with_hopper)]  # decode and prefill


@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize("activation", ACTIVATE)
def test_norm_linear_reaches_the_device_check(activation, M, on_host):
    h, weight, bias = torch.zeros(M, 40).half(), torch.zeros(88, 40).half(), torch.zeros(80).half()
    for sumsq in (None, torch.ones(M)):
        with refuses_host_memory():
            cuda.norm_linear(h, weight, bias, 1e-5, 48, sumsq, activation, 8)


@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize("shortcut", ["absent", "dense", "transposed", "low rank"])
def test_residual_linear_reaches_the_device_check(shortcut, M, on_host):
    a, weight, h, S = (torch.zeros(shape).bfloat16() for shape in ((M, 2048), (64, 2048), (M, 64), (64, 64)))
    rest = {"absent": (h, None, None), "dense": (None, h, S), "transposed": (None, h, S.T), "low rank": (h, h, S)}
    with refuses_host_memory():
        cuda.residual_linear(a, weight, None, *rest[shortcut])


@with_hopper
@pytest.mark.parametrize("extras", [False, True])
def test_covariance_reaches_the_device_check(extras, on_host):
    x, acc = torch.zeros(70, 40).half(), torch.zeros(40, 40).double()
    with refuses_host_memory():
        cuda.covariance_(acc, x, *((torch.ones(70), torch.ones(70) > 0) if extras else (None, None)))


def at_256(rows, columns, stride=None):
    """What a launcher asks of a tensor, of one that no memory stands behind."""
    return SimpleNamespace(data_ptr=lambda: 256, shape=(rows, columns), stride=lambda: (stride or columns, 1))


@with_cuda
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": at_256(17, 8)}, "does not take these sizes"),
        ({"h": at_256(0, 8)}, "does not take these sizes"),
        ({"h": at_256(2, 0)}, "does not take these sizes"),
        ({"dtype": 0}, "does not take these sizes"),
        ({"activation": 5}, "does not take these sizes"),
        ({"weight": at_256(7, 8), "activation": 4}, "does not take these sizes"),
        ({"unscaled": 9}, "does not take these sizes"),
        ({"y": None}, "null pointer"),
        ({"splits": 3}, "does not take these sizes"),
        ({"splits": 16}, "does not take these sizes"),
        ({"splits": 4}, "workspace or the counters"),
        ({"splits": 4, "workspace": at_256(1, 1 << 20)}, "workspace or the counters"),
        ({"splits": 4, "workspace": at_256(1, 16), "counters": at_256(1, 16)}, "workspace or the counters"),
    ],
)
def test_launcher_refuses(change, message):
    arguments = dict(
        h=at_256(2, 8), weight=at_256(8, 8), bias=None, sumsq=None, y=at_256(2, 8), unscaled=0, eps=0.0, full_width=1.0,
        activation=0, dtype=1, splits=1, workspace=None, counters=None, stream=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        _C.cuda_norm_linear(*(arguments | change).values())


@with_cuda
def test_plans_fill_the_gpu():
    splits, workspace, counters = _C.cuda_residual_linear_plan(1, 3072, 11008, 3072, 132)
    tiles = 3072 // 64
    assert tiles * splits == 192
    assert counters == tiles + 1
    assert workspace == tiles * splits * 8 * 65 + tiles * 8
    assert _C.cuda_norm_linear_plan(16, 12288, 64, 3072, 0, 132)[0] == 1


@with_hopper
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": at_256(0, 8)}, "does not take these sizes"),
        ({"h": at_256((1 << 30) + 1, 8)}, "does not take these sizes"),
        ({"h": at_256(17, 0)}, "does not take these sizes"),
        ({"weight": at_256(0, 8)}, "does not take these sizes"),
        ({"dtype": 0}, "does not take these sizes"),
        ({"activation": 5}, "does not take these sizes"),
        ({"weight": at_256(7, 8), "activation": 4}, "does not take these sizes"),
        ({"sms": 0}, "does not take these sizes"),
        ({"h": None}, "null pointer"),
        ({"sumsq": None}, "null pointer"),
        ({"h": at_256(17, 8, 9)}, "not aligned"),
    ],
)
def test_prefill_launcher_refuses(change, message):
    arguments = dict(
        h=at_256(17, 8), weight=at_256(8, 8), bias=None, sumsq=at_256(1, 17), y=at_256(17, 8), unscaled=0, eps=0.0,
        full_width=1.0, activation=0, dtype=1, sms=132, stream=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        _C.cuda_norm_linear_prefill(*(arguments | change).values())


@with_hopper
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": at_256(0, 8)}, "does not take these sizes"),
        ({"a2": at_256(17, -1)}, "does not take these sizes"),
        ({"sumsq": None}, "null pointer"),
        ({"workspace": None}, "workspace"),
        ({"workspace": at_256(1, 16)}, "workspace"),
        ({"a": at_256(17, 8, 4)}, "not aligned"),
    ],
)
def test_residual_prefill_launcher_refuses(change, message):
    arguments = dict(
        a=at_256(17, 8), weight=at_256(8, 8), bias=None, residual=None, a2=None, weight2=None, y=at_256(17, 8),
        sumsq=at_256(1, 17), dtype=2, sms=132, workspace=at_256(1, 17), stream=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        _C.cuda_residual_linear_prefill(*(arguments | change).values())


@with_hopper
def test_prefill_workspace_has_a_sum_per_row_and_tile():
    assert _C.cuda_residual_linear_prefill_workspace(100, 257) == 3 * 100


def test_copyable_rows_start_on_16_bytes():
    x = torch.arange(80.0).half().view(5, 16)
    assert cuda.copyable(None) is None
    assert cuda.copyable(x) is x
    assert cuda.copyable(x[:, :11]).data_ptr() == x.data_ptr()
    for misaligned in (x[:, 3:], torch.ones(5, 9).half(), x[:1].expand(5, 16)):
        copy = cuda.copyable(misaligned)
        assert torch.equal(copy, misaligned)
        assert copy.data_ptr() % 16 == copy.stride(0) % 8 == 0
        assert copy.stride(0) >= copy.shape[1]


@with_cuda
@pytest.mark.parametrize("d", [2872, 3072])
def test_last_waves_of_a_sliced_llama_2_7b_saturate_memory(d):
    """At least one block per SM in every wave of two."""
    for n in (9216, 12288, 22016):
        blocks = -(-n // 64) * _C.cuda_norm_linear_plan(1, n, 0, d, 4 if n == 22016 else 0, 132)[0]
        assert (blocks - 1) % 264 >= 131, n
    for k, k2 in ((4096, 0), (4096, d), (11008, 0), (11008, d)):
        blocks = -(-d // 64) * _C.cuda_residual_linear_plan(1, d, k, k2, 132)[0]
        assert (blocks - 1) % 264 >= 131, k


@pytest.fixture(params=["the GPU"] if torch.cuda.is_available() else ["80", "90a"])
def arch(request):
    """The decode kernels of the GPU, or each kind of them in the emulator."""
    with nullcontext() if torch.cuda.is_available() else emulating(request.param):
        yield request.param


@pytest.mark.parametrize("splits", [1, 2, 4, 8])
@pytest.mark.parametrize("M", [1, 8, 9, 16])
def test_splits_are_exact_and_repeatable(M, splits, arch, monkeypatch):
    """The output of norm_linear goes into residual_linear as the decoder layers hand it on: a and t are its columns."""
    for name in ("cuda_norm_linear_plan", "cuda_residual_linear_plan"):
        monkeypatch.setattr(cuda._C, name, lambda *sizes: (splits, 1 << 20, 1 << 10))
    d, k = 200, 512
    for r in (11, 16):
        kind = dict(dtype=torch.bfloat16, device=device_of("cuda"))
        h, bias = random(M, d, **kind), random(2 * k, **kind)
        reader = (h, random(2 * k + r, d, scale=d**-0.5, **kind), bias, 1e-5, d, None, "silu_gate", r)
        read = norm_linear(*reader, backend="cuda")
        assert torch.equal(read, norm_linear(*reader, backend="cuda"))
        assert_as_good_as_torch(read, norm_linear(*reader, backend="reference"), norm_reference(*double(reader)))

        weight, V = random(d, k, scale=k**-0.5, **kind), random(d, r, **kind)
        for V_along in (V.T, V.T.contiguous()):
            writer = (read[:, :k], weight, None, h, (read[:, k:], V_along))
            y, sumsq = residual_linear(*writer, backend="cuda")
            again = residual_linear(*writer, backend="cuda")
            assert torch.equal(y, again[0])
            assert torch.equal(sumsq, again[1])
            by_torch, _ = residual_linear(*writer, backend="reference")
            assert_as_good_as_torch(y, by_torch, residual_linear(*double(writer), backend="reference")[0])
            torch.testing.assert_close(sumsq, y.double().square().sum(1).float(), rtol=1e-6, atol=1e-7)
    assert not counters(1024, h.device).any()
