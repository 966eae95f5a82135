"""norm_linear and residual_linear on quantised weights: the kernels against fp64, by the rule of `accuracy`."""

import pytest
import torch
from ops.accuracy import assert_as_good_as_torch, double, random
from quantized import FORMATS, quantized

from slicegpt_fast.errors import InputError
from slicegpt_fast.kernels.native import build_info
from slicegpt_fast.ops import norm_linear, residual_linear
from slicegpt_fast.ops.backends import cpu
from slicegpt_fast.ops.dispatch import OPS, Request
from slicegpt_fast.ops.norm_linear import ACTIVATE
from slicegpt_fast.ops.norm_linear import reference as norm_reference
from slicegpt_fast.ops.quantized import dequantize
from slicegpt_fast.ops.residual_linear import reference as residual_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5
# Rows, and n and k of the weight: odd widths, short last groups, one column, more than one step of every kernel.
SHAPES = [(1, 40, 24), (3, 17, 33), (2, 9, 257), (7, 33, 1), (16, 24, 130), (40, 72, 203), (70, 33, 95)]


@pytest.fixture(params=FORMATS, ids=lambda stored: f"{stored[0]} bits, group {stored[1]}")
def stored(request):
    return request.param


def weight_of(n, k, bits, group):
    return quantized(random(n, k, dtype=torch.float32, device="cpu", scale=max(k, 1) ** -0.5), bits, group)


def check_norm(h, weight, scales, *rest):
    y = norm_linear(h, weight, *rest, scales=scales, backend="cpu")
    exact = norm_reference(*double((h, dequantize(weight, scales, h.shape[1], torch.float64), *rest)))
    assert_as_good_as_torch(y, norm_reference(h, weight, *rest, scales), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_linear_matches_fp64(shape, dtype, stored):
    M, n, k = shape
    h, bias = random(M, k, dtype=dtype, device="cpu", scale=3.0), random(n, dtype=dtype, device="cpu")
    check_norm(h, *weight_of(n, k, *stored), bias, EPS, k + 24, None, None, 0)


@pytest.mark.parametrize("activation", ACTIVATE)
@pytest.mark.parametrize("M", [3, 100])
def test_activations_and_unscaled_columns(activation, M, stored):
    h, bias = random(M, 70, dtype=torch.bfloat16, device="cpu"), random(72, dtype=torch.bfloat16, device="cpu")
    check_norm(h, *weight_of(72 + 5, 70, *stored), bias, EPS, 94, h.float().square().sum(1), activation, 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shortcut", ["absent", "dense", "low rank"])
@pytest.mark.parametrize("M", [1, 5, 80])
def test_residual_linear_matches_fp64(M, shortcut, dtype, stored):
    a, h = (random(M, width, dtype=dtype, device="cpu") for width in (101, 40))
    second = {
        "absent": (h, None, None),
        "dense": (None, h, random(40, 40, dtype=dtype, device="cpu", scale=0.2)),
        "low rank": (h, random(M, 7, dtype=dtype, device="cpu"), random(7, 40, dtype=dtype, device="cpu")),
    }[shortcut]
    weight, scales = weight_of(40, 101, *stored)
    y, sumsq = OPS["residual_linear"](a, weight, None, *second, scales, backend="cpu")
    by_torch, _ = residual_reference(a, weight, None, *second, scales)
    exact, _ = residual_reference(*double((a, dequantize(weight, scales, 101, torch.float64), None, *second)))
    assert_as_good_as_torch(y, by_torch, exact)
    torch.testing.assert_close(sumsq, y.double().square().sum(1).float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("M", [1, 8])
@pytest.mark.parametrize("k", [77, 129, 640])
def test_nothing_beside_a_row_plays_a_part(k, M, stored):
    """Rows lie amid other bytes, and scales amid NaN; what a last byte has left over counts for nothing."""
    h = random(M, k, dtype=torch.bfloat16, device="cpu")
    weight, scales = weight_of(24, k, *stored)
    expected = norm_linear(h, weight, None, EPS, k, scales=scales, backend="cpu")
    room = torch.full((26, weight.shape[1] + 5), 119, dtype=weight.dtype)
    view = room[1:-1, 3:-2].copy_(weight)
    if stored[0] == 4 and k % 2:
        view[:, -1] |= 0xF0
    amid = torch.full((26, scales.shape[1] + 2), float("nan"), dtype=torch.float16)
    y = norm_linear(h, view, None, EPS, k, scales=amid[1:-1, 1:-1].copy_(scales), backend="cpu")
    assert torch.equal(y, expected)
    strided = weight.T.contiguous().T, scales.T.contiguous().T
    assert torch.equal(norm_linear(h, strided[0], None, EPS, k, scales=strided[1], backend="cpu"), expected)


@pytest.mark.parametrize("shape", [(0, 8, 16), (4, 0, 16), (4, 8, 0)], ids=str)
def test_empty(shape, stored):
    M, n, k = shape
    weight, scales = weight_of(n, k, *stored)
    h = random(M, k, dtype=torch.bfloat16, device="cpu")
    assert (norm_linear(h, weight, None, EPS, 16, scales=scales) == 0).all()
    stream = random(M, n, dtype=torch.bfloat16, device="cpu")
    assert torch.equal(residual_linear(h, weight, None, stream, scales=scales)[0], stream)


@pytest.mark.parametrize("M", [1, 7, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_no_bit(M, dtype, stored, threads):
    h, (weight, scales) = random(M, 136, dtype=dtype, device="cpu"), weight_of(70, 136, *stored)
    expected = norm_linear(h, weight, None, EPS, 136, scales=scales, backend="cpu")
    for count in (1, 3):
        threads(count)
        assert torch.equal(norm_linear(h, weight, None, EPS, 136, scales=scales, backend="cpu"), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 15, 64, 131])
def test_cpu_dequantizes_as_the_definition_says(k, dtype, stored):
    weight, scales = weight_of(9, k, *stored)
    x = torch.empty(1, k, dtype=dtype)
    assert torch.equal(cpu._dequantized(weight, scales, x), dequantize(weight, scales, k, dtype))


def test_every_level_of_either_format():
    """The lowest levels, which quantising to nearest never gives, too."""
    for weight in (torch.arange(-128, 128, dtype=torch.int8)[None], torch.arange(256, dtype=torch.uint8)[None]):
        scales = torch.full((1, 1), 0.5, dtype=torch.float16)
        k = weight.shape[1] * (1 if weight.dtype == torch.int8 else 2)
        for dtype in DTYPES:
            eye, rest = torch.eye(k, dtype=dtype), (None, 0.0, 1, None, None, 1)
            read = norm_linear(eye, weight, *rest, scales=scales, backend="cpu")
            each = [norm_linear(x[None], weight, *rest, scales=scales, backend="cpu") for x in eye[:: k // 16]]
            expected = dequantize(weight, scales, k, dtype)
            assert torch.equal(read.T, expected)
            assert torch.equal(torch.cat(each).T, expected[:, :: k // 16])


@pytest.mark.parametrize("op", ["norm_linear", "residual_linear"])
@pytest.mark.parametrize("weight", ["int8", "int4"])
def test_operands_ask_for_what_they_were_made_for(op, weight):
    epilogue = None if op == "norm_linear" else "add"
    asked = Request(op, torch.device("cpu"), torch.float32, "decode", (2, 6, 71), epilogue, weight)
    assert OPS[op].request(*OPS[op].operands(asked)) == asked
    OPS[op](*OPS[op].operands(asked), backend="cpu")


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("op", ["norm_linear", "residual_linear"])
def test_the_kernels_of_gpus_refuse(op, backend, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("slicegpt_fast.kernels.measured.gpu_name", lambda device: "NVIDIA H100")
    asked = Request(op, torch.device("cuda"), torch.bfloat16, "decode", (1, 64, 64), None, "int4")
    if backend == "cuda" and build_info().cuda_compiler is None:
        pytest.skip("built without CUDA")
    assert OPS[op].refusal(backend, asked) == "it has no kernel for weights in int4"
    assert OPS[op].choose("auto", asked) == "reference"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(scales=None), "argument weight has dtype torch.uint8; pass a floating-point tensor"),
        (dict(weight=torch.zeros(6, 4).half()), "argument weight is torch.float16; with scales it must be int8"),
        (dict(weight=torch.zeros(6, 3, dtype=torch.uint8)), "argument weight has 3 columns"),
        (dict(weight=torch.zeros(24, dtype=torch.uint8)), "argument weight has 1 dimensions; pass a matrix"),
        (dict(scales=torch.ones(6, 2).half()), "argument scales has 2 columns"),
        (dict(scales=torch.ones(6, 1)), r"argument scales is torch.float32 \[6, 1\]"),
    ],
)
def test_bad_arguments_are_named(change, sentence):
    given = dict(weight=torch.zeros(6, 4, dtype=torch.uint8), scales=torch.ones(6, 1).half()) | change
    with pytest.raises(InputError, match=sentence):
        norm_linear(torch.zeros(3, 8), bias=None, eps=EPS, full_width=8, **given)
    with pytest.raises(InputError, match=sentence):
        residual_linear(torch.zeros(3, 8), bias=None, h=torch.zeros(3, 6), **given)


def test_registration():
    h, (weight, scales) = torch.randn(4, 37), weight_of(8, 37, 4, 32)
    stream = torch.randn(4, 8)
    norm, residual = torch.ops.slicegpt_fast.norm_linear, torch.ops.slicegpt_fast.residual_linear
    torch.library.opcheck(norm, (h, weight, None, EPS, 37, None, None, 0, scales, "reference"))
    torch.library.opcheck(residual, (h, weight, None, stream, None, None, scales, "reference"))


def test_gradients_go_to_the_activations():
    h, (weight, scales) = torch.randn(3, 37, dtype=torch.float64, requires_grad=True), weight_of(6, 37, 4, 32)
    assert torch.autograd.gradcheck(lambda x: norm_linear(x, weight, None, EPS, 37, scales=scales), (h,))
