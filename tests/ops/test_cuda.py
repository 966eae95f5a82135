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
        ("attend", "decode", "cuda", (8, 0), torch.float16, ("nvcc", ("80",)), None),
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
    """Without a driver the CUDA runtime says so; with one, a kernel would run on what is not on its device."""
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    return pytest.raises(RuntimeError, match=r"CUDA driver|CUDA-capable")


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


@with_cuda
def test_attend_reaches_the_device_check(on_host):
    q, k, cache = (torch.zeros(shape).half() for shape in ((1, 2, 4, 16), (1, 2, 2, 16), (1, 2, 8, 16)))
    angles = torch.zeros(1, 2, 8).half()
    with refuses_host_memory():
        cuda.attend(q, k, k, angles, angles, cache, cache.clone(), torch.tensor(3), 0.25, None, None, None, 0.0)


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
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": at_256(3, 4)}, "does not take these sizes"),
        ({"new_keys": at_256(2, 3)}, "does not take these sizes"),
        ({"size": 257}, "does not take these sizes"),
        ({"rank": 65}, "does not take these sizes"),
        ({"cosine": at_256(1, 66)}, "does not take these sizes"),
        ({"dtype": 0}, "does not take these sizes"),
        ({"splits": 65}, "does not take these sizes"),
        ({"start": None}, "null pointer"),
        ({"splits": 2}, "workspace or the counters"),
        ({"splits": 2, "workspace": at_256(1, 1 << 20)}, "workspace or the counters"),
    ],
)
def test_attend_launcher_refuses(change, message):
    arguments = dict(
        queries=at_256(2, 4), new_keys=at_256(2, 2), new_values=at_256(2, 2), cosine=None, sine=None, query_norm=None,
        key_norm=None, keys=at_256(4, 640), values=at_256(4, 640), mask=None, start=at_256(1, 1), y=at_256(2, 256),
        batch=2, size=64, rank=64, eps=0.0, scale=1.0, dtype=1, splits=1, workspace=None, counters=None, stream=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        _C.cuda_attend(*(arguments | change).values())


@with_cuda
def test_plans_fill_the_gpu():
    splits, workspace, counters = _C.cuda_residual_linear_plan(1, 3072, 11008, 3072, 132)
    tiles = 3072 // 64
    assert tiles * splits == 192
    assert counters == tiles + 1
    assert workspace == tiles * splits * 8 * 65 + tiles * 8
    assert _C.cuda_norm_linear_plan(16, 12288, 64, 3072, 0, 132)[0] == 1
    splits, workspace, counters = _C.cuda_attend_plan(1, 1, 32, 32, 4096, 132)
    assert (splits, workspace, counters) == (4, 32 * 4 * 16 * 258, 32)


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
        ({"width": 144}, "does not take these sizes"),
        ({"h": None}, "null pointer"),
        ({"sumsq": None}, "null pointer"),
        ({"h": at_256(17, 8, 9)}, "not aligned"),
    ],
)
def test_prefill_launcher_refuses(change, message):
    arguments = dict(
        h=at_256(17, 8), weight=at_256(8, 8), bias=None, sumsq=at_256(1, 17), y=at_256(17, 8), unscaled=0, eps=0.0,
        full_width=1.0, activation=0, dtype=1, width=256, sms=132, stream=0,
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
        ({"width": 64}, "does not take these sizes"),
        ({"splits": 0}, "does not take these sizes"),
        ({"splits": 2}, "does not take these sizes"),
        ({"workspace": None}, "workspace"),
        ({"workspace": at_256(1, 16)}, "workspace"),
        ({"a": at_256(17, 8, 4)}, "not aligned"),
    ],
)
def test_residual_prefill_launcher_refuses(change, message):
    arguments = dict(
        a=at_256(17, 8), weight=at_256(8, 8), bias=None, residual=None, a2=None, weight2=None, y=at_256(17, 8),
        sumsq=at_256(1, 17), dtype=2, width=128, splits=1, sms=132, workspace=at_256(1, 17), stream=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        _C.cuda_residual_linear_prefill(*(arguments | change).values())


@with_hopper
def test_prefill_plans():
    width, splits, cells = _C.cuda_residual_linear_prefill_plan(4096, 3328, 4096, 3328, 132)
    assert (width, splits, cells) == (208, 1, 16 * 4096)  # a sum per row and tile
    width, splits, cells = _C.cuda_residual_linear_prefill_plan(64, 2872, 4096, 2872, 132)
    assert splits > 1
    assert cells == splits * 64 * -(-2872 // width) * width
    assert _C.cuda_norm_linear_prefill_width(4096, 12288, 0, 3072, 0, 132) == 256


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


@pytest.mark.parametrize(("M", "splits"), [(1, 1), (1, 8), (8, 4), (9, 2), (16, 8)])
def test_splits_are_exact_and_repeatable(M, splits, arch, monkeypatch):
    """The output of norm_linear goes into residual_linear as the decoder layers hand it on: a and t are its columns."""
    for name in ("cuda_norm_linear_plan", "cuda_residual_linear_plan"):
        monkeypatch.setattr(cuda._C, name, lambda *sizes: (splits, 1 << 20, 1 << 10))
    d, k = 136, 320
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


WIDTHS = (256, 240, 224, 208, 192, 160, 128)


@pytest.fixture
def hopper():
    """The prefill kernels: of the GPU where it is a Hopper, else in the emulator."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("its kernels are for compute capability 9.0")
    with nullcontext() if torch.cuda.is_available() else emulating("90a"):
        yield


@pytest.mark.parametrize("width", WIDTHS)
def test_norm_linear_in_tiles_of_every_width(width, hopper, monkeypatch):
    """Two tiles of each part, of which the second one is not full: gates beside their ups, then plain columns."""
    monkeypatch.setattr(cuda._C, "cuda_norm_linear_prefill_width", lambda *sizes: width)
    kind, d, unscaled = dict(dtype=torch.bfloat16, device=device_of("cuda")), 40, 12
    for activation, scaled in (("silu_gate", width + 20), ("gelu", width - 4)):
        weight, bias = random(scaled + unscaled, d, scale=d**-0.5, **kind), random(scaled, **kind)
        arguments = random(70, d, **kind), weight, bias, 1e-5, d, None, activation, unscaled
        y = norm_linear(*arguments, backend="cuda")
        assert_as_good_as_torch(y, norm_linear(*arguments, backend="reference"), norm_reference(*double(arguments)))


@pytest.mark.parametrize(
    ("width", "splits", "M", "k"),
    # Every width whole and split; then rows for two to five warpgroups, and splits of more steps than there are stages.
    [(width, splits, 17, 136) for width in WIDTHS for splits in (1, 4)]
    + [(208, 2, 70, 72), (160, 2, 140, 40), (128, 2, 260, 8), (256, 2, 66, 520)],
)
def test_residual_linear_in_tiles_of_every_width(width, splits, M, k, hopper, monkeypatch):
    n, r = width + 21, 24
    cells = splits * M * 2 * width
    monkeypatch.setattr(cuda._C, "cuda_residual_linear_prefill_plan", lambda *sizes: (width, splits, cells))
    kind = dict(dtype=torch.bfloat16, device=device_of("cuda"))
    a, weight, bias = random(M, k, **kind), random(n, k, scale=k**-0.5, **kind), random(n, **kind)
    h, t, V = random(M, n, **kind), random(M, r, **kind), random(n, r, scale=r**-0.5, **kind)
    for V_along in (V.T, V.T.contiguous()):
        arguments = a, weight, bias, h, (t, V_along)
        y, sumsq = residual_linear(*arguments, backend="cuda")
        by_torch, _ = residual_linear(*arguments, backend="reference")
        assert_as_good_as_torch(y, by_torch, residual_linear(*double(arguments), backend="reference")[0])
        torch.testing.assert_close(sumsq, y.double().square().sum(1).float(), rtol=1e-6, atol=1e-7)
