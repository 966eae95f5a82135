"""residual_linear: the kernels against fp64, by the rule of `accuracy`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.accuracy import apart, assert_as_good_as_torch, device_of, double, other_defaults, poisoned, random
from torch._dynamo.testing import CompileCounterWithBackend

from slicegpt_fast.errors import InputError
from slicegpt_fast.ops import residual_linear, use_backend

SHORTCUTS = ["absent", "dense", "low rank"]


def inputs(M, n, k, shortcut, dtype, device, bias=True):
    """a, weight, bias, h and the shortcut; the dense one reads a stream of another width."""
    d = n + 9 if shortcut == "dense" else n
    matrices = {
        "absent": None,
        "dense": random(d, n, dtype=dtype, device=device, scale=max(d, 1) ** -0.5),
        "low rank": (random(M, 11, dtype=dtype, device=device), random(11, n, dtype=dtype, device=device)),
    }
    return (
        random(M, k, dtype=dtype, device=device),
        random(n, k, dtype=dtype, device=device, scale=max(k, 1) ** -0.5),
        random(n, dtype=dtype, device=device) if bias else None,
        random(M, d, dtype=dtype, device=device),
        matrices[shortcut],
    )


def check(arguments, backend):
    y, sumsq = residual_linear(*arguments, backend=backend)
    by_torch, _ = residual_linear(*apart(arguments), backend="reference")
    exact, _ = residual_linear(*double(arguments), backend="reference")
    assert_as_good_as_torch(y, by_torch, exact)
    torch.testing.assert_close(sumsq, y.double().square().sum(1).float(), rtol=1e-6, atol=1e-7)  # of the rounded h'


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("shape", [(1, 40, 24), (3, 17, 33), (17, 72, 40), (199, 136, 88), (40, 33, 17)], ids=str)
def test_matches_fp64(shape, shortcut, backend, dtype, device):
    check(inputs(*shape, shortcut, dtype, device), backend)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize(("M", "n"), [(5, 264), (140, 264), (300, 250)])
def test_more_than_one_tile(M, n, shortcut, backend, device):
    """The last sizes take the widest tiles of the CUDA kernels."""
    check(inputs(M, n, 200, shortcut, torch.float16, device, bias=False), backend)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("M", [3, 40])
def test_views_and_poison(M, shortcut, backend, dtype, device):
    a, weight, bias, h, matrices = inputs(M, 48, 40, shortcut, dtype, device)
    if shortcut == "dense":
        matrices = poisoned(matrices)
    elif shortcut == "low rank":
        matrices = tuple(map(poisoned, matrices))
    check((poisoned(a), poisoned(weight), bias, poisoned(h), matrices), backend)


@pytest.mark.parametrize("M", [2, 20])
def test_transposed_matrices(M, backend, dtype, device):
    """S may be the transposed view of a linear layer's weight, and any matrix a transposed one."""
    a, weight, bias, h, S = inputs(M, 40, 24, "dense", dtype, device)
    check((a, weight, bias, h, S.T.contiguous().T), backend)
    check((a.T.contiguous().T, weight.T.contiguous().T, bias, h.T.contiguous().T, S), backend)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("shape", [(0, 8, 16), (4, 0, 16), (4, 8, 0)], ids=str)
def test_empty(shape, shortcut, backend, dtype, device):
    arguments = inputs(*shape, shortcut, dtype, device)
    y, sumsq = residual_linear(*arguments, backend=backend)
    assert y.shape == shape[:2]
    torch.testing.assert_close(sumsq, y.float().square().sum(1))


@settings(max_examples=15, deadline=None)
@given(
    M=st.integers(1, 80),
    n=st.integers(1, 120),
    k=st.integers(1, 120),
    shortcut=st.sampled_from(SHORTCUTS),
    seed=st.integers(0, 99),
)
def test_any_shape(backend, M, n, k, shortcut, seed):
    torch.manual_seed(seed)
    check(inputs(M, n, k, shortcut, torch.float16, device_of(backend)), backend)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_decode_split_k_is_exact_and_repeatable(shortcut, device, monkeypatch):
    from slicegpt_fast.triton_kernels import residual_linear as kernels

    monkeypatch.setattr(kernels, "choose_split", lambda gpu, tile, tiles, k: (3, -(-k // (3 * tile.k)) * tile.k))
    arguments = inputs(5, 136, 720, shortcut, torch.float16, device)
    check(arguments, "triton")
    first, second = (residual_linear(*arguments, backend="triton") for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("M", [3, 17])
def test_offsets_are_64_bit(M, backend, device):
    """The last rows of a and h start past 2^31 elements."""
    a, weight, bias, h, _ = inputs(M, 24, 16, "absent", torch.float16, device)
    stride = 2**31 // (M - 1) // 8 * 8 + 8
    far_a, far_h = (torch.empty_strided(x.shape, (stride, 1), dtype=x.dtype, device=device).copy_(x) for x in (a, h))
    far = residual_linear(far_a, weight, bias, far_h, backend=backend)
    near = residual_linear(a, weight, bias, h, backend=backend)
    assert torch.equal(far[0], near[0])
    assert torch.equal(far[1], near[1])


@pytest.mark.parametrize("M", [1, 7, 100])
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_threads_change_no_bit(shortcut, M, dtype, threads):
    arguments = inputs(M, 70, 136, shortcut, dtype, "cpu")
    expected = residual_linear(*arguments, backend="cpu")
    for count in (1, 3):
        threads(count)
        assert all(map(torch.equal, residual_linear(*arguments, backend="cpu"), expected))


@pytest.mark.parametrize("M", [3, 100])
def test_defaults_of_torch_play_no_part(M):
    arguments = inputs(M, 24, 16, "dense", torch.float32, "cpu")
    expected = residual_linear(*arguments, backend="cpu")
    with other_defaults():
        y, sumsq = residual_linear(*arguments, backend="cpu")
    assert torch.equal(y, expected[0])
    assert torch.equal(sumsq, expected[1])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("a", dict(a=torch.zeros(3))),
        ("weight", dict(weight=torch.zeros(6, 5))),
        ("bias", dict(bias=torch.zeros(5))),
        ("h", dict(h=torch.zeros(3, 5))),
        ("h", dict(h=torch.zeros(2, 8), shortcut=torch.zeros(8, 6))),
        ("shortcut", dict(shortcut=torch.zeros(5, 6))),
        (r"shortcut\[0\]", dict(shortcut=(torch.zeros(2, 2), torch.zeros(2, 6)))),
        (r"shortcut\[1\]", dict(shortcut=(torch.zeros(3, 2), torch.zeros(3, 6)))),
        (r"shortcut\[1\]", dict(shortcut=(torch.zeros(3, 2), torch.zeros(2, 6).half()))),
    ],
)
def test_bad_arguments_are_named(name, change):
    arguments = dict(a=torch.zeros(3, 4), weight=torch.zeros(6, 4), bias=torch.zeros(6), h=torch.zeros(3, 6))
    with pytest.raises(InputError, match=f"argument {name} "):
        residual_linear(**(arguments | change))


def test_registration(device):
    a, weight, bias, h, S = inputs(4, 8, 5, "dense", torch.float32, device)
    with use_backend("reference"):
        torch.library.opcheck(torch.ops.slicegpt_fast.residual_linear, (a, weight, bias, None, h, S, None, "auto"))
        torch.library.opcheck(
            torch.ops.slicegpt_fast.residual_linear, (a, weight, None, h[:, :8], None, None, None, "auto")
        )


def test_compiles_with_dynamic_shapes(device):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = []

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def layer(a, weight, h):
        y, sumsq = residual_linear(a * 2, weight, None, h)
        return y * torch.rsqrt(sumsq)[:, None]

    for M in (3, 20):
        a, weight, _, h, _ = inputs(M, 6, 8, "absent", torch.float32, device)
        expected = torch.nn.functional.normalize(2 * a @ weight.T + h)
        torch.testing.assert_close(layer(a, weight, h), expected)
        compiled.append(counter.frame_count)
    assert compiled[0] == compiled[1]


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_gradients(shortcut, device):
    a, weight, bias, h, matrices = double(inputs(3, 6, 4, shortcut, torch.float32, device))
    tensors = tuple(x.requires_grad_() for x in (a, weight, bias, h))
    assert torch.autograd.gradcheck(lambda *x: residual_linear(*x, matrices)[0], tensors)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("M", [4, 100])
def test_cuda_graph_replays(M, backend):
    a, weight, bias, h, S = inputs(M, 264, 520, "dense", torch.bfloat16, "cuda")
    expected = residual_linear(a, weight, bias, h, S, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = residual_linear(a, weight, bias, h, S, backend=backend)
    for _ in range(3):
        for x in replayed:
            x.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(replayed, expected, strict=True))
