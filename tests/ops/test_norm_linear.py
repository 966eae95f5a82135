"""norm_linear: the kernels against fp64, by the rule of `accuracy`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.accuracy import assert_as_good_as_torch, device_of, double, other_defaults, poisoned, random
from torch._dynamo.testing import CompileCounterWithBackend

from slicegpt_fast.errors import InputError
from slicegpt_fast.ops import norm_linear, use_backend
from slicegpt_fast.ops.norm_linear import ACTIVATE, reference

EPS = 1e-5


def inputs(M, n, d, dtype, device, activation=None, unscaled=0, bias=True):
    """h and weight, then the other arguments."""
    h = random(M, d, dtype=dtype, device=device, scale=3.0)
    weight = random(n, d, dtype=dtype, device=device, scale=max(d, 1) ** -0.5)
    bias = random(n - unscaled, dtype=dtype, device=device) if bias else None
    return h, weight, bias, EPS, d + 24, None, activation, unscaled


def check(arguments, backend):
    y = norm_linear(*arguments, backend=backend)
    exact = reference(*double(arguments))
    assert_as_good_as_torch(y, reference(*arguments), exact)


@pytest.mark.parametrize("shape", [(1, 40, 24), (3, 17, 33), (17, 72, 40), (199, 136, 88), (40, 33, 17)], ids=str)
def test_matches_fp64(shape, backend, dtype, device):
    check(inputs(*shape, dtype, device), backend)


@pytest.mark.parametrize("M", [3, 40])
@pytest.mark.parametrize("unscaled", [0, 8, 3])
@pytest.mark.parametrize("activation", ACTIVATE)
def test_activations_and_unscaled_columns(activation, unscaled, M, backend, dtype, device):
    check(inputs(M, 2 * 36 + unscaled, 40, dtype, device, activation, unscaled), backend)


@pytest.mark.parametrize(("M", "pairs"), [(5, 130), (130, 130), (300, 120)])
def test_more_than_one_tile(M, pairs, backend, dtype, device):
    """The last sizes take the widest tiles of the CUDA kernels."""
    check(inputs(M, 2 * pairs + 40, 200, dtype, device, "silu_gate", 40), backend)


@pytest.mark.parametrize("M", [2, 33])
def test_given_sumsq(M, backend, dtype, device):
    h, weight, bias, eps, width, *rest = inputs(M, 24, 40, dtype, device)
    check((h, weight, bias, eps, width, h.float().square().sum(1) * 1.5, *rest[1:]), backend)


@pytest.mark.parametrize("M", [3, 40])
def test_views_and_poison(M, backend, dtype, device):
    h, weight, *rest = inputs(M, 48, 40, dtype, device)
    exact = reference(*double((h, weight, *rest)))
    by_torch = reference(h, weight, *rest)
    store = random(M, 80, dtype=dtype, device=device)
    store[:, 8:48] = h
    for x in (poisoned(h), store[:, 8:48], h.T.contiguous().T):
        for w in (poisoned(weight), weight.T.contiguous().T):
            assert_as_good_as_torch(norm_linear(x, w, *rest, backend=backend), by_torch, exact)


@pytest.mark.parametrize("shape", [(0, 8, 16), (4, 0, 16), (4, 8, 0)], ids=str)
def test_empty(shape, backend, dtype, device):
    y = norm_linear(*inputs(*shape, dtype, device, bias=False), backend=backend)
    assert y.shape == shape[:2]
    assert (y == 0).all()


@settings(max_examples=15, deadline=None)
@given(
    M=st.integers(1, 80),
    pairs=st.integers(1, 60),
    d=st.integers(1, 120),
    unscaled=st.integers(0, 20),
    activation=st.sampled_from(list(ACTIVATE)),
    seed=st.integers(0, 99),
)
def test_any_shape(backend, M, pairs, d, unscaled, activation, seed):
    torch.manual_seed(seed)
    check(inputs(M, 2 * pairs + unscaled, d, torch.float16, device_of(backend), activation, unscaled), backend)


def test_decode_split_k_is_exact_and_repeatable(device, monkeypatch):
    from slicegpt_fast.triton_kernels import norm_linear as kernels

    monkeypatch.setattr(kernels, "choose_split", lambda gpu, tile, tiles, k: (3, -(-k // (3 * tile.k)) * tile.k))
    arguments = inputs(5, 72, 720, torch.float16, device, "silu_gate", 8)
    check(arguments, "triton")
    assert torch.equal(*(norm_linear(*arguments, backend="triton") for _ in range(2)))


def test_large_values_do_not_overflow(backend, device):
    """h W^T alone would pass fp16's largest number; the norm brings it back."""
    h, weight, *rest = inputs(20, 16, 32, torch.float16, device)
    check((h * 1000, weight * 100, *rest), backend)


@pytest.mark.parametrize("M", [3, 17])
def test_offsets_are_64_bit(M, backend, device):
    """The last rows of h and weight start past 2^31 elements."""
    h, weight, *rest = inputs(M, 24, 16, torch.float16, device)
    far_h = torch.empty_strided(h.shape, (2**31 // (M - 1) // 8 * 8 + 8, 1), dtype=h.dtype, device=device).copy_(h)
    far_w = torch.empty_strided(weight.shape, (2**27, 1), dtype=h.dtype, device=device).copy_(weight)
    assert torch.equal(
        norm_linear(far_h, far_w, *rest, backend=backend), norm_linear(h, weight, *rest, backend=backend)
    )


def test_silu_gate_takes_the_gate_rows_first():
    h, gate, up = torch.randn(3, 4).double(), torch.randn(5, 4).double(), torch.randn(5, 4).double()
    x = h * torch.rsqrt(h.square().mean(1, keepdim=True))
    expected = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
    y = norm_linear(h, torch.cat((gate, up)), None, 0.0, 4, activation="silu_gate", backend="reference")
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("M", [1, 7, 100])
def test_threads_change_no_bit(M, dtype, threads):
    arguments = inputs(M, 70, 136, dtype, "cpu", "gelu", 3)
    expected = norm_linear(*arguments, backend="cpu")
    for count in (1, 3):
        threads(count)
        assert torch.equal(norm_linear(*arguments, backend="cpu"), expected)


@pytest.mark.parametrize("activation", [None, "silu_gate"])
@pytest.mark.parametrize("M", [1, 4])
def test_threads_share_no_column_of_a_transposed_weight(M, activation, dtype, threads):
    """Their ranges end within a vector: at each half of a gate, and before the unscaled columns."""
    h, weight, *rest = inputs(M, 2 * 40 + 17, 2048, dtype, "cpu", activation, 17)
    weight = weight.T.contiguous().T
    expected = None
    for count in [1] + 20 * [2]:
        threads(count)
        y = norm_linear(h, weight, *rest, backend="cpu")
        expected = y if expected is None else expected
        assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATE)
def test_extreme_values(activation, dtype):
    extremes = torch.tensor([-3e38, -1e5, -100, -89, -88, -0.0, 0, 88, 1e5, 3e38, -torch.inf, torch.nan])
    weight = torch.zeros(len(extremes), 8, dtype=dtype)
    arguments = torch.ones(1, 8, dtype=dtype), weight, extremes.to(dtype), EPS, 8, None, activation, 0
    if activation == "silu_gate":
        arguments = (
            arguments[0],
            torch.cat((weight, weight)),
            torch.cat((extremes, extremes)).to(dtype),
            *arguments[3:],
        )
    y = norm_linear(*arguments, backend="cpu")
    torch.testing.assert_close(y, reference(*double(arguments)).to(dtype), equal_nan=True)


def test_cpu_leaves_fp64_to_torch():
    arguments = double(inputs(2, 4, 3, torch.float32, "cpu"))
    with pytest.raises(InputError, match=r"'cpu' cannot run norm_linear: it has no torch\.float64 kernel"):
        norm_linear(*arguments, backend="cpu")
    assert torch.equal(norm_linear(*arguments), reference(*arguments))


@pytest.mark.parametrize("activation", ["gelu", "silu_gate"])
@pytest.mark.parametrize("M", [3, 100])
def test_defaults_of_torch_play_no_part(M, activation):
    arguments = inputs(M, 24, 16, torch.float32, "cpu", activation)
    expected = norm_linear(*arguments, backend="cpu")
    with other_defaults():
        assert torch.equal(norm_linear(*arguments, backend="cpu"), expected)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("h", dict(h=torch.zeros(3))),
        ("weight", dict(weight=torch.zeros(6, 5))),
        ("weight", dict(weight=torch.zeros(6, 4).half())),
        ("weight", dict(weight=torch.zeros(7, 4), activation="silu_gate", bias=None)),
        ("bias", dict(bias=torch.zeros(5))),
        ("bias", dict(bias=torch.zeros(6), unscaled=1)),
        ("sumsq", dict(sumsq=torch.zeros(2))),
        ("sumsq", dict(sumsq=torch.zeros(3).double())),
        ("activation", dict(activation="swish")),
        ("unscaled", dict(unscaled=7)),
        ("full_width", dict(full_width=0)),
    ],
)
def test_bad_arguments_are_named(name, change):
    arguments = dict(h=torch.zeros(3, 4), weight=torch.zeros(6, 4), bias=torch.zeros(6), eps=EPS, full_width=4)
    with pytest.raises(InputError, match=f"argument {name} "):
        norm_linear(**(arguments | change))


def test_registration(device):
    h, weight, bias, eps, width, sumsq, _, _ = inputs(4, 8, 5, torch.float32, device)
    with use_backend("reference"):
        for rest in ((sumsq, "silu_gate", 0), (torch.ones(4, device=device), None, 0)):
            arguments = (h, weight, bias, eps, width, *rest, None, "auto")
            torch.library.opcheck(torch.ops.slicegpt_fast.norm_linear, arguments)


def test_compiles_with_dynamic_shapes(device):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = []

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def layer(h, weight):
        return norm_linear(h * 2, weight, None, EPS, 8, activation="silu_gate") + 1

    for M in (3, 20):
        h, weight, *_ = inputs(M, 6, 8, torch.float32, device)
        torch.testing.assert_close(layer(h, weight), reference(2 * h, weight, None, EPS, 8, None, "silu_gate", 0) + 1)
        compiled.append(counter.frame_count)
    assert compiled[0] == compiled[1]


def test_gradients(device):
    arguments = tuple(
        x.requires_grad_() if isinstance(x, torch.Tensor) else x
        for x in double(inputs(3, 6, 4, torch.float32, device, "silu_gate"))
    )
    assert torch.autograd.gradcheck(lambda *tensors: norm_linear(*tensors, *arguments[3:]), arguments[:3])
