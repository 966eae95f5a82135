"""Decode programs: whole layers in one call give bit for bit what the ops give one by one."""

import pytest
import torch
from ops.accuracy import assert_as_good_as_torch, random

from slicegpt_fast import _C
from slicegpt_fast.kernels.native import ACTIVATIONS, DTYPES
from slicegpt_fast.kernels.operands import cache, heads, tokens
from slicegpt_fast.ops import attend, norm_linear, residual_linear

WIDTH, INNER, ROOM, LAYERS = 72, 56, 300, 2
H, G, D, RANK, ROTATED = 6, 2, 16, 13, 8
QKV = [H * D, G * D, G * RANK]
EPS, ROWS = 1e-5, 16


def matrices(dtype):
    """The weights of one layer; its first shortcut is a dense matrix, its second the stream itself."""
    shapes = dict(qkv=(sum(QKV), WIDTH), o=(WIDTH, H * RANK), gate_up=(2 * INNER, WIDTH), down=(WIDTH, INNER))
    shapes["S"] = (WIDTH, WIDTH)
    weights = {
        name: random(*shape, dtype=dtype, device="cpu", scale=shape[1] ** -0.5) for name, shape in shapes.items()
    }
    return weights | {"bias": random(sum(QKV), dtype=dtype, device="cpu")}


def split_heads(qkv):
    """Queries, keys and values [B, T, heads, numbers] of qkv [B, T, all of them]."""
    parts = zip(qkv.split(QKV, dim=2), (H, G, G), strict=True)
    return [part.unflatten(2, (count, -1)) for part, count in parts]


def one_by_one(h, layers, angles, caches, start, mask):
    """The layers, op after op. h [B, T, WIDTH]."""
    B, T, _ = h.shape
    h = h.flatten(0, 1)
    for weights, (keys, values) in zip(layers, caches, strict=True):
        qkv = norm_linear(h, weights["qkv"], weights["bias"], EPS, WIDTH, backend="cpu")
        new = split_heads(qkv.unflatten(0, (B, T)))
        a = attend(*new, *angles, keys, values, torch.tensor(start), D**-0.5, mask, backend="cpu")
        h, _ = residual_linear(a, weights["o"], None, h, weights["S"], backend="cpu")
        a = norm_linear(h, weights["gate_up"], None, EPS, WIDTH, activation="silu_gate", backend="cpu")
        h, _ = residual_linear(a, weights["down"], None, h, backend="cpu")
    return h


def program_of(layers, dtype):
    """The same layers as a program, and its memory, of which the first is where it begins and ends."""
    program, code = _C.Program(), DTYPES[dtype]
    widths = (WIDTH, WIDTH, sum(QKV), H * RANK, INNER)
    memory = h, between, qkv, y, inner = [torch.zeros(ROWS, width, dtype=dtype) for width in widths]
    new = [heads(x) for x in split_heads(qkv[None])]
    for w in layers:
        program.norm_linear(h, w["qkv"], None, None, w["bias"], qkv, 0, EPS, WIDTH, ACTIVATIONS[None], code, code)
        program.attend(*new, None, None, y, D, RANK, 0.0, D**-0.5, code)
        program.residual_linear(y, w["o"], None, None, None, h, w["S"], between, code, code)
        program.norm_linear(
            between, w["gate_up"], None, None, None, inner, 0, EPS, WIDTH, ACTIVATIONS["silu_gate"], code, code
        )
        program.residual_linear(inner, w["down"], None, None, between, None, None, h, code, code)
    return program, memory


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_program_gives_the_bits_of_the_ops(dtype, threads):
    """Three calls: a prompt of two sequences, with a mask, then single tokens, over the same caches."""
    layers = [matrices(dtype) for _ in range(LAYERS)]
    program, memory = program_of(layers, dtype)
    caches, own_caches = (torch.zeros(LAYERS, 2, 2, G, ROOM, D, dtype=dtype) for _ in range(2))
    for layer, pair in enumerate(own_caches):
        program.cache(layer, *map(cache, pair))
    start = 0
    for T in (7, 1, 1):
        h = random(2, T, WIDTH, dtype=dtype, device="cpu")
        angles = 6 * torch.rand(1, T, ROTATED)
        angles = [f(angles).to(dtype) for f in (torch.cos, torch.sin)]
        mask = (torch.rand(2, T, ROOM) < 0.7).tril(start) if T > 1 else None
        expected = one_by_one(h, layers, angles, caches, start, mask)
        memory[0][: 2 * T] = h.flatten(0, 1)
        program.run(2, T, 0, start, *map(tokens, angles), tokens(mask), threads)
        assert torch.equal(memory[0][: 2 * T], expected)
        assert torch.equal(own_caches, caches)
        start += T + 250 * (T > 1)  # beyond a chunk of the cache


def one_norm_linear(h, weight, norm, unscaled):
    y = torch.empty(len(h), len(weight), dtype=h.dtype)
    program, code = _C.Program(), DTYPES[h.dtype]
    program.norm_linear(h, weight, None, norm, None, y, unscaled, EPS, h.shape[1], ACTIVATIONS[None], code, code)
    program.run(1, len(h), 0, 0, None, None, None, 2)
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_with_a_weight(dtype):
    h, weight = random(3, 40, dtype=dtype, device="cpu"), random(24, 40, dtype=dtype, device="cpu", scale=0.2)
    norm = 1 + random(40, dtype=dtype, device="cpu", scale=0.1)
    y_torch, y_exact = (
        torch.nn.functional.rms_norm(x, (40,), n, EPS) @ w.T
        for x, n, w in ((h, norm, weight), (h.double(), norm.double(), weight.double()))
    )
    assert_as_good_as_torch(one_norm_linear(h, weight, norm, 0), y_torch, y_exact)


def test_unscaled_columns_come_with_the_opposite_sign():
    h, weight = (random(rows, 40, dtype=torch.bfloat16, device="cpu") for rows in (3, 24))
    expected = norm_linear(h, weight, None, EPS, 40, unscaled=5, backend="cpu")
    expected[:, -5:] *= -1
    assert torch.equal(one_norm_linear(h, weight, None, 5), expected)


def test_program_without_an_op_does_nothing():
    _C.Program().run(1, 1, 0, 0, None, None, None, 2)
