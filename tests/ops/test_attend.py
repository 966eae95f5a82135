"""attend: the kernels against fp64, by the rule of `accuracy`, and what they leave in the cache."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.accuracy import assert_as_good_as_torch, device_of, double, other_defaults, random
from ops.conftest import KERNELS

from slicegpt_fast.errors import InputError
from slicegpt_fast.kernels.counters import counters
from slicegpt_fast.ops import attend, use_backend
from slicegpt_fast.ops.backends import cuda

KEYS, VALUES = 5, 6  # where the caches stand among the arguments


@dataclass(frozen=True)
class Case:
    """A call: B sequences of T new tokens behind `start` cached ones, H query heads over G of D numbers."""

    B: int
    T: int
    H: int
    G: int
    D: int
    rank: int  # numbers of a value
    rotated: int
    start: int
    room: int = 3  # positions of the cache behind the new tokens

    def arguments(self, dtype, device, mask=False, norms=False, beside=0):
        """Views of one projection's result and caches whose free room holds NaN, `beside` which there is more."""
        B, T, H, G, D = self.B, self.T, self.H, self.G, self.D
        end, widths = self.start + T, [H * D, G * D, G * self.rank]
        qkv = random(B, T, beside + sum(widths), dtype=dtype, device=device)[..., beside:].split(widths, dim=2)
        q, k, v = (x.unflatten(2, (heads, -1)) for x, heads in zip(qkv, (H, G, G), strict=True))
        angles = 6 * torch.rand(B if beside else 1, T, self.rotated, device=device)
        caches = torch.full((2, B, G, end + self.room + beside, D), float("nan"), dtype=dtype, device=device)
        caches[..., : self.start, :] = random(2, B, G, self.start, D, dtype=dtype, device=device)
        caches[1, ..., : self.start, self.rank :] = 0
        keys, values = caches[:, :, :, : end + self.room]
        weights = [1 + random(D, dtype=dtype, device=device, scale=0.1) for _ in range(2)] if norms else [None, None]
        return (
            q, k, v, *(f(angles).to(dtype) if self.rotated else None for f in (torch.cos, torch.sin)), keys, values,
            torch.tensor(self.start, device=device), D**-0.5, self.mask(device) if mask else None, *weights, 1e-5,
        )  # fmt: skip

    def mask(self, device):
        """Causal with random holes; the first token of each sequence attends to none."""
        allowed = torch.rand(self.B, self.T, self.start + self.T + self.room, device=device) < 0.7
        allowed = allowed.tril(self.start)
        allowed[:, 0] = False
        return allowed


CASES = [
    Case(1, 1, 4, 4, 64, 64, 64, 0),
    Case(1, 1, 9, 3, 64, 40, 64, 300),
    Case(2, 3, 8, 2, 24, 13, 12, 254),
    Case(1, 5, 4, 1, 33, 33, 0, 30),
    Case(3, 2, 6, 1, 16, 16, 16, 270),
    Case(1, 16, 2, 2, 7, 5, 6, 250),
    Case(1, 2, 20, 1, 128, 128, 32, 65),
    Case(1, 1, 1, 1, 256, 200, 256, 40),
]


def with_own_caches(arguments):
    """The same arguments, the caches copied with their strides: the call writes there."""
    copies = [
        torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
        for x in arguments[KEYS : VALUES + 1]
    ]
    return (*arguments[:KEYS], *copies, *arguments[VALUES + 1 :])


def run(arguments, backend):
    """The result, and both caches as the call left them."""
    arguments = with_own_caches(arguments)
    return attend(*arguments, backend=backend), arguments[KEYS], arguments[VALUES]


def check(arguments, backend):
    y, keys, values = run(arguments, backend)
    y_torch, keys_torch, values_torch = run(arguments, "reference")
    y_exact, keys_exact, _ = run(double(arguments), "reference")
    assert_as_good_as_torch(y, y_torch, y_exact)
    start, T = int(arguments[7]), arguments[0].shape[1]
    new = slice(start, start + T)
    assert_as_good_as_torch(keys[:, :, new], keys_torch[:, :, new], keys_exact[:, :, new])
    torch.testing.assert_close(values, values_torch, rtol=0, atol=0, equal_nan=True)
    keys[:, :, new] = keys_torch[:, :, new]
    torch.testing.assert_close(keys, keys_torch, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_fp64(case, backend, dtype, device):
    check(case.arguments(dtype, device), backend)


@pytest.mark.parametrize("case", CASES[1:5:3], ids=str)
def test_masks(case, backend, dtype, device):
    check(case.arguments(dtype, device, mask=True), backend)


@pytest.mark.parametrize("case", CASES[2:4], ids=str)
def test_norms_of_queries_and_keys(case, backend, dtype, device):
    check(case.arguments(dtype, device, norms=True), backend)


@pytest.mark.parametrize("case", CASES[2:4], ids=str)
def test_views_and_poison(case, backend, dtype, device):
    """Caches cut from longer ones, rows that start on no vector, angles and a mask of each sequence."""
    check(case.arguments(dtype, device, mask=True, beside=5), backend)


def test_one_norm_alone(backend, device):
    arguments = CASES[3].arguments(torch.float16, device, norms=True)
    check((*arguments[:-2], None, arguments[-1]), backend)
    check((*arguments[:-3], None, *arguments[-2:]), backend)


def test_one_mask_for_all_sequences(backend, device):
    arguments = list(Case(3, 2, 2, 1, 16, 16, 16, 30).arguments(torch.float16, device, mask=True))
    arguments[9] = arguments[9][:1]
    check(tuple(arguments), backend)
    arguments[9] = arguments[9].expand(3, -1, -1)
    check(tuple(arguments), backend)


def test_token_that_attends_to_none_gets_zeros(backend, device):
    arguments = Case(2, 3, 2, 1, 16, 16, 16, 20).arguments(torch.float16, device, mask=True)
    y, _, _ = run(arguments, backend)
    assert (y.unflatten(0, (2, 3))[:, 0] == 0).all()
    assert (y.unflatten(0, (2, 3))[:, 1:] != 0).any(dim=2).all()


def test_tokens_one_by_one_or_together(backend, device):
    """A cache filled step by step holds, and gives, what one call for all of its tokens does."""
    q, k, v, cosine, sine, keys, values, start, *rest = Case(2, 3, 2, 1, 16, 16, 16, 0).arguments(torch.float16, device)
    y, whole_keys, whole_values = run((q, k, v, cosine, sine, keys, values, start, *rest), backend)
    for t in range(3):
        new, angles = (x[:, t : t + 1] for x in (q, k, v)), (x[:, t : t + 1] for x in (cosine, sine))
        step = attend(*new, *angles, keys, values, start + t, *rest, backend=backend)
        torch.testing.assert_close(step, y.unflatten(0, (2, 3))[:, t], rtol=0.02, atol=2e-3)
    assert torch.equal(keys[:, :, :3], whole_keys[:, :, :3])
    assert torch.equal(values[:, :, :3], whole_values[:, :, :3])


@pytest.mark.parametrize(
    "case", [Case(0, 1, 2, 1, 8, 8, 8, 4), Case(1, 0, 2, 1, 8, 8, 8, 4), Case(1, 2, 2, 1, 8, 0, 8, 4)], ids=str
)
def test_empty(case, backend, dtype, device):
    y, keys, _ = run(case.arguments(dtype, device), backend)
    assert y.shape == (case.B * case.T, case.H * case.rank)
    assert not keys[:, :, : case.start + case.T].isnan().any()


@settings(max_examples=8, deadline=None)
@given(
    B=st.integers(1, 2),
    T=st.integers(1, 9),
    G=st.integers(1, 2),
    shared=st.integers(1, 5),
    D=st.integers(1, 40),
    start=st.integers(0, 200),
    mask=st.booleans(),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_any_shape(backend, B, T, G, shared, D, start, mask, seed, data):
    torch.manual_seed(seed)
    rank, rotated = data.draw(st.integers(1, D)), 2 * data.draw(st.integers(0, D // 2))
    case = Case(B, T, G * shared, G, D, rank, rotated, start)
    check(case.arguments(torch.float16, device_of(backend), mask), backend)


@pytest.mark.parametrize("case", [Case(1, 1, 9, 3, 64, 64, 64, start) for start in (255, 256, 1000)], ids=str)
def test_threads_change_no_bit(case, dtype, threads):
    arguments = case.arguments(dtype, "cpu")
    expected = run(arguments, "cpu")
    for count in (1, 2, 3, 5):
        threads(count)
        for x, y in zip(run(arguments, "cpu"), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", [name for name in KERNELS if name != "cpu"])
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_splits_are_exact_and_repeatable(splits, backend, device, monkeypatch):
    """Of five splits the last ones have no cached position."""
    from slicegpt_fast.triton_kernels import attend as kernels

    monkeypatch.setattr(kernels, "choose_splits", lambda *sizes: splits)
    if backend == "cuda":
        monkeypatch.setattr(cuda._C, "cuda_attend_plan", lambda *sizes: (splits, 1 << 20, 1 << 10))
    arguments = Case(1, 2, 2, 1, 24, 20, 24, 150).arguments(torch.float16, device, mask=True)
    check(arguments, backend)
    assert torch.equal(run(arguments, backend)[0], run(arguments, backend)[0])
    assert not counters(1024, torch.device(device)).any()


def test_defaults_of_torch_play_no_part():
    arguments = CASES[2].arguments(torch.float32, "cpu")
    expected = run(arguments, "cpu")[0]
    arguments = with_own_caches(arguments)
    with other_defaults():
        y = attend(*arguments, backend="cpu")
    assert torch.equal(y, expected)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("queries", dict(queries=torch.zeros(2, 3, 8))),
        ("queries", dict(queries=torch.zeros(2, 3, 4, 8, dtype=torch.int32))),
        ("new_keys", dict(new_keys=torch.zeros(2, 3, 3, 8))),
        ("new_keys", dict(new_keys=torch.zeros(2, 3, 2, 7))),
        ("new_values", dict(new_values=torch.zeros(2, 3, 2, 9))),
        ("new_values", dict(new_values=torch.zeros(2, 4, 2, 8))),
        ("cosine", dict(cosine=torch.zeros(1, 3, 5), sine=torch.zeros(1, 3, 5))),
        ("cosine", dict(cosine=torch.zeros(3, 3, 4))),
        ("sine", dict(sine=None)),
        ("sine", dict(sine=torch.zeros(1, 3, 4).half())),
        ("keys", dict(keys=torch.zeros(2, 2, 8))),
        ("keys", dict(keys=torch.zeros(2, 2, 8, 10).transpose(2, 3))),
        ("values", dict(values=torch.zeros(2, 2, 9, 8))),
        ("values", dict(values=torch.zeros(1, 2, 10, 8).expand(2, -1, -1, -1))),
        ("start", dict(start=torch.tensor(1, dtype=torch.int32))),
        ("start", dict(start=torch.zeros(2, dtype=torch.int64))),
        ("start", dict(start=torch.tensor(1, device="meta"))),
        ("mask", dict(mask=torch.zeros(2, 3, 10))),
        ("mask", dict(mask=torch.zeros(2, 3, 10, dtype=torch.bool, device="meta"))),
        ("mask", dict(mask=torch.zeros(3, 3, 10, dtype=torch.bool))),
        ("query_norm", dict(query_norm=torch.zeros(4))),
        ("key_norm", dict(key_norm=torch.zeros(8).double())),
    ],
)
def test_bad_arguments_are_named(name, change):
    new = {key: torch.zeros(2, 3, heads, 8) for key, heads in dict(queries=4, new_keys=2, new_values=2).items()}
    caches = dict(keys=torch.zeros(2, 2, 10, 8), values=torch.zeros(2, 2, 10, 8))
    angles = dict(cosine=torch.zeros(1, 3, 4), sine=torch.zeros(1, 3, 4))
    with pytest.raises(InputError, match=f"argument {name} "):
        attend(**(new | caches | angles | dict(start=torch.tensor(1), scale=1.0) | change))


def test_registration(device):
    with use_backend("reference"):
        for mask, norms in ((False, False), (True, True)):
            arguments = CASES[2].arguments(torch.float32, device, mask, norms)
            for cache in arguments[KEYS : VALUES + 1]:
                cache.nan_to_num_()
            torch.library.opcheck(torch.ops.slicegpt_fast.attend, (*arguments, "auto"))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_cuda_graph_replays_with_another_start(backend):
    """The length of the cache is read on the GPU: one graph serves all steps."""
    arguments = with_own_caches(Case(1, 1, 8, 2, 64, 64, 64, 300, room=200).arguments(torch.bfloat16, "cuda"))
    start = arguments[7]
    arguments[KEYS].nan_to_num_()
    arguments[VALUES].nan_to_num_()
    attend(*arguments, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = attend(*arguments, backend=backend)
    for length in (0, 300, 431):
        start.fill_(length)
        expected = attend(*with_own_caches(arguments), backend=backend)
        replayed.fill_(float("nan"))
        graph.replay()
        assert torch.equal(replayed, expected)
