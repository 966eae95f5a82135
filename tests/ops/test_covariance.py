"""covariance_: every backend against fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.accuracy import device_of, poisoned
from torch._dynamo.testing import CompileCounterWithBackend

from slicegpt_fast.errors import InputError
from slicegpt_fast.ops import covariance_, use_backend

on_cpu = pytest.mark.parametrize(
    ("backend", "dtype"), [("cpu", dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)], ids=str
)


def exact(x, row_scale=None, mask=None):
    rows = x.double()
    if row_scale is not None:
        rows = rows * row_scale.double()[:, None]
    if mask is not None:
        rows = rows[mask]
    return rows.T @ rows


def relative_error(value, expected):
    return ((value.double() - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def uneven(N, D, dtype, device):
    """Columns with means and very different sizes, as in a residual stream."""
    sizes = torch.logspace(-2, 1, D, device=device)
    return ((torch.randn(N, D, device=device) + 0.5) * sizes).to(dtype)


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (3, 17), (17, 40), (199, 300), (530, 152), (4000, 24)], ids=str)
def test_matches_fp64(shape, backend, dtype, device):
    x = uneven(*shape, dtype, device)
    acc = torch.eye(shape[1], dtype=torch.float64, device=device)
    expected = acc + exact(x)
    assert covariance_(acc, x, backend=backend) is acc
    assert relative_error(acc, expected) <= 1e-6
    assert torch.equal(acc, acc.T)


@on_cpu
@pytest.mark.parametrize("shape", [(300, 1230), (4500, 50)], ids=str)
@pytest.mark.parametrize("master", [torch.float64, torch.float32], ids=str)
def test_more_than_one_tile_or_chunk(shape, master, backend, dtype):
    x = uneven(*shape, dtype, "cpu")
    acc = torch.eye(shape[1], dtype=master)
    expected = acc + exact(x)
    covariance_(acc, x, backend=backend)
    assert relative_error(acc, expected) <= 1e-6
    assert torch.equal(acc, acc.T)


@pytest.mark.parametrize("width", [40, 33])
def test_row_scale_and_mask(width, backend, dtype, device):
    x = uneven(199, width, dtype, device)
    row_scale = torch.rsqrt(x.float().square().mean(1) + 1e-6)
    row_scale[7] = 0.0
    mask = torch.rand(199, device=device) > 0.3
    expected = exact(x, row_scale, mask)
    x[~mask] = float("nan")
    row_scale[~mask] = float("inf")
    acc = torch.zeros(width, width, dtype=torch.float64, device=device)
    covariance_(acc, x, row_scale, mask, backend=backend)
    assert relative_error(acc, expected) <= 1e-5


def test_views(backend, dtype, device):
    store = uneven(120, 100, dtype, device)
    for x in (store[:, 3:40], store[::3, 8:48], store[5:, 16:56], store[:40].T, poisoned(store[:51, :49])):
        acc = torch.full((x.shape[1] + 2, x.shape[1]), 7.0, dtype=torch.float32, device=device)
        covariance_(acc[1:-1], x, backend=backend)
        assert relative_error(acc[1:-1], 7.0 + exact(x)) <= 1e-6
        assert (acc[0] == 7).all()
        assert (acc[-1] == 7).all()


def test_acc_of_any_strides(backend, dtype, device):
    x = uneven(30, 40, dtype, device)
    store = torch.zeros(80, 80, dtype=torch.float64, device=device)
    for acc in (store[:40, :40].T, store[40:, ::2]):
        covariance_(acc, x, backend=backend)
        assert relative_error(acc, exact(x)) <= 1e-6
    assert (store[40:, 1::2] == 0).all()


@on_cpu
def test_only_the_lower_triangle_is_read(backend, dtype):
    x = uneven(50, 100, dtype, "cpu")
    acc = torch.full((100, 100), float("nan")).triu(1)
    covariance_(acc, x, backend=backend)
    assert relative_error(acc, exact(x)) <= 1e-6


def test_a_mask_leaves_nothing_or_all(backend, dtype, device):
    x = uneven(20, 24, dtype, device)
    acc = torch.zeros(24, 24, dtype=torch.float64, device=device)
    covariance_(acc, x, mask=torch.zeros(20, dtype=torch.bool, device=device), backend=backend)
    assert (acc == 0).all()
    covariance_(acc, x, mask=torch.ones(20, dtype=torch.bool, device=device), backend=backend)
    assert relative_error(acc, exact(x)) <= 1e-6


@on_cpu
def test_a_row_that_is_not_finite_shows_in_its_columns_alone(backend, dtype):
    x = uneven(150, 100, dtype, "cpu")
    x[140, 50] = float("inf")
    acc = torch.zeros(100, 100)
    covariance_(acc, x, backend=backend)
    assert not acc[50].isfinite().any()
    others = torch.arange(100) != 50
    assert acc[others][:, others].isfinite().all()


def test_many_fp32_rows_are_as_good_as_torch():
    x = uneven(40000, 24, torch.float32, "cpu")
    acc = torch.zeros(24, 24, dtype=torch.float64)
    covariance_(acc, x, backend="cpu")
    assert relative_error(acc, exact(x)) <= 2 * relative_error(x.T @ x, exact(x))


@on_cpu
@pytest.mark.parametrize("shape", [(70, 130), (300, 1230)], ids=str)
def test_threads_change_no_bit(shape, backend, dtype, threads):
    x = uneven(*shape, dtype, "cpu")
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        results.append(covariance_(torch.zeros(shape[1], shape[1]), x, backend=backend))
    assert all(torch.equal(results[0], result) for result in results)


@pytest.mark.parametrize("shape", [(0, 8), (5, 0)], ids=str)
def test_empty(shape, backend, dtype, device):
    acc = torch.ones(shape[1], shape[1], device=device)
    covariance_(acc, torch.empty(shape, dtype=dtype, device=device), backend=backend)
    assert (acc == 1).all()


@settings(max_examples=15, deadline=None)
@given(
    N=st.integers(1, 300), D=st.integers(1, 140), masked=st.booleans(), scaled=st.booleans(), seed=st.integers(0, 99)
)
def test_any_shape(backend, N, D, masked, scaled, seed):
    torch.manual_seed(seed)
    device = device_of(backend)
    x = uneven(N, D, torch.float16, device)
    mask = torch.rand(N, device=device) > 0.5 if masked else None
    row_scale = torch.rand(N, device=device) + 0.1 if scaled else None
    acc = torch.zeros(D, D, dtype=torch.float64, device=device)
    covariance_(acc, x, row_scale, mask, backend=backend)
    assert relative_error(acc, exact(x, row_scale, mask)) <= (1e-5 if scaled else 1e-6)


def tensor_core_sums(x, chain, block, bits):
    """X^T X in MMA chains, as tensor cores are known to add (arXiv 2512.07004), and the chains' sums in fp32.

    The products of ``block`` rows and the sum so far are cut off ``bits`` behind the largest of their exponents, added
    exactly, and the sum is cut to fp32.
    """

    def exponent(value):
        return torch.where(value == 0, -999, torch.frexp(value)[1] - 1)

    total = torch.zeros(x.shape[1], x.shape[1])
    for rows in x.double().split(chain):
        held = torch.zeros_like(total, dtype=torch.float64)
        for part in rows.split(block):
            products = part[:, :, None] * part[:, None, :]
            exponents = (exponent(part)[:, :, None] + exponent(part)[:, None, :]).amax(0)
            grid = torch.exp2((torch.maximum(exponents, exponent(held)) - bits).double())
            mantissa, scale = torch.frexp(((products / grid).trunc().sum(0) + (held / grid).trunc()) * grid)
            held = torch.ldexp((mantissa * 2**24).trunc(), scale - 24)
        total += held.float()
    return total


@pytest.mark.parametrize(("block", "bits"), [(8, 24), (16, 25)], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_chains_bound_what_tensor_cores_cut_off(half, block, bits):
    covariance = pytest.importorskip("slicegpt_fast.triton_kernels.covariance")
    x = torch.randn(8192, 16).to(half)
    assert relative_error(tensor_core_sums(x, covariance.CHAIN[half], block, bits), exact(x)) <= 1e-6
    assert relative_error(tensor_core_sums(x, 2048, block, bits), exact(x)) > 1e-6  # so chains it takes


def test_splits_add_up_in_order(device, monkeypatch):
    """Many splits and many MMA chains give the exact sum, and the same bits every time."""
    from slicegpt_fast.triton_kernels import covariance

    monkeypatch.setattr(covariance, "choose_splits", lambda gpu, tile, N, D: 5)
    x = uneven(2500, 24, torch.float16, device)
    results = [torch.zeros(24, 24, dtype=torch.float64, device=device) for _ in range(2)]
    for acc in results:
        covariance_(acc, x, backend="triton")
    assert relative_error(results[0], exact(x)) <= 1e-6
    assert torch.equal(*results)


@on_cpu
@pytest.mark.parametrize("master", [torch.float64, torch.float32], ids=str)
def test_a_million_tokens_in_many_calls(master, backend, dtype):
    x = uneven(10**6, 16, dtype, "cpu")
    acc = torch.zeros(16, 16, dtype=master)
    for rows in x.split(4000):
        covariance_(acc, rows, backend=backend)
    assert relative_error(acc, exact(x)) <= 1e-6


def test_a_call_onto_a_million_tokens_errs_by_what_it_adds(backend, dtype, device):
    """So errors are no larger in a sum over any number of calls. An fp32 master would round by more."""
    held = exact(uneven(10**6, 16, torch.float16, device))
    x = uneven(700, 16, dtype, device)
    acc = held.clone()
    covariance_(acc, x, backend=backend)
    assert relative_error(acc - held, exact(x)) <= 1e-6


def test_the_longest_split(device, monkeypatch):
    from slicegpt_fast.triton_kernels import covariance

    monkeypatch.setattr(covariance, "choose_splits", lambda gpu, tile, N, D: 1)
    x = uneven(covariance.LONGEST_SPLIT, 16, torch.float16, device)
    acc = torch.zeros(16, 16, dtype=torch.float64, device=device)
    covariance_(acc, x, backend="triton")
    assert relative_error(acc, exact(x)) <= 1e-6


def test_offsets_are_64_bit(backend, device):
    """Rows lie 2^30 elements apart, so the last one starts past 2^31."""
    x = torch.empty_strided((4, 16), (2**30, 1), dtype=torch.float16, device=device)
    x.copy_(torch.randn(4, 16))
    acc = torch.zeros(16, 16, dtype=torch.float64, device=device)
    covariance_(acc, x, backend=backend)
    assert relative_error(acc, exact(x)) <= 1e-6


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("acc", dict(acc=torch.zeros(3, 4))),
        ("acc", dict(acc=torch.zeros(4, 4, dtype=torch.float16))),
        ("acc", dict(acc=torch.zeros(4).expand(4, 4))),
        ("x", dict(x=torch.zeros(2, 3, 4))),
        ("x", dict(x=torch.zeros(5, 4, dtype=torch.int64))),
        ("row_scale", dict(row_scale=torch.zeros(4))),
        ("row_scale", dict(row_scale=torch.zeros(5, dtype=torch.int32))),
        ("mask", dict(mask=torch.zeros(5))),
        ("mask", dict(mask=torch.zeros(1, 5, dtype=torch.bool))),
        ("backend", dict(backend="fast")),
    ],
)
def test_bad_arguments_are_named(name, change):
    arguments = dict(acc=torch.zeros(4, 4), x=torch.zeros(5, 4)) | change
    with pytest.raises(InputError, match=f"argument {name} "):
        covariance_(**arguments)


def test_autograd_knows_that_acc_has_changed(backend, dtype, device):
    acc, w = torch.ones(8, 8, device=device), torch.ones(8, 8, device=device, requires_grad=True)
    product = (w * acc).sum()
    covariance_(acc, torch.ones(3, 8, dtype=dtype, device=device), backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_registration(device):
    x = torch.randn(6, 5, device=device)
    mask = torch.ones(6, dtype=torch.bool, device=device)
    acc = torch.zeros(5, 5, dtype=torch.float64, device=device)
    with use_backend("reference"):
        torch.library.opcheck(torch.ops.slicegpt_fast.covariance_, (acc, x, None, mask, "auto"))


def test_compiles_with_dynamic_shapes(device):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = []

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def accumulate(acc, x):
        return covariance_(acc, x * 2) + 1

    for N in (3, 7):
        x = torch.randn(N, 5, device=device)
        acc = torch.zeros(5, 5, dtype=torch.float64, device=device)
        assert relative_error(accumulate(acc, x) - 1, exact(2 * x)) <= 1e-6
        assert relative_error(acc, exact(2 * x)) <= 1e-6
        compiled.append(counter.frame_count)
    assert compiled[0] == compiled[1]
