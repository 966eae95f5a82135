"""Slicing against the published algorithm (arXiv 2401.15024, Algorithm 1), written out from scratch in NumPy and fp64.

A Llama block by block: at each norm the uncentred covariance of the stream that the slices before it left, its leading
eigenvectors Q, the stream rotated by them and cut, weights multiplied by Q on the side that touches the stream.
"""

import numpy as np
import pytest
import torch
from models import tiny_model, tokens

from slicegpt_fast import slice_model

HEADS, KEY_HEADS, HEAD_DIM, THETA = 4, 2, 12, 10000.0


def normalise(stream, full_width, eps):  # [T, d]
    return stream / np.sqrt((stream**2).sum(-1, keepdims=True) / full_width + eps)


def rotate_halves(x, positions):  # [T, heads, head_dim]
    angles = positions[:, None] / THETA ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    cos, sin = (np.concatenate([f(angles)] * 2, -1)[:, None] for f in (np.cos, np.sin))
    left, right = np.split(x, 2, -1)
    return x * cos + np.concatenate([-right, left], -1) * sin


def attend(q, k, v):  # [T, HEADS * HEAD_DIM], [T, KEY_HEADS * HEAD_DIM]
    length = len(q)
    q = rotate_halves(q.reshape(length, HEADS, HEAD_DIM), np.arange(length))
    k = rotate_halves(k.reshape(length, KEY_HEADS, HEAD_DIM), np.arange(length))
    k, v = (np.repeat(x.reshape(length, KEY_HEADS, HEAD_DIM), HEADS // KEY_HEADS, 1) for x in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(HEAD_DIM)
    scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, v).reshape(length, HEADS * HEAD_DIM)


def attention(w, x):
    return attend(*(x @ w[f"{name}.weight"].T + w[f"{name}.bias"] for name in ("q_proj", "k_proj", "v_proj")))


def feed_forward(w, x):
    gate, up = (x @ w[f"{name}.weight"].T + w[f"{name}.bias"] for name in ("gate_proj", "up_proj"))
    return gate / (1 + np.exp(-gate)) * up


def leading_directions(streams, width):
    covariance = sum(stream.T @ stream for stream in streams)
    return np.linalg.eigh(covariance)[1][:, ::-1][:, :width]


def slice_and_run(model, calibration, ids, width):
    """Logits [B, T, V] of the model sliced to ``width`` directions, its head left whole."""
    weights = {name: parameter.detach().double().numpy() for name, parameter in model.named_parameters()}
    full, eps = model.config.hidden_size, model.config.rms_norm_eps
    embed = weights["model.embed_tokens.weight"]
    # The calibration sequences and those to be evaluated travel together; only the former shape the bases.
    streams = [embed[row] for row in (*calibration, *ids)]
    basis = leading_directions(streams[: len(calibration)], width)
    streams = [stream @ basis for stream in streams]
    blocks = [(kind, layer) for layer in range(model.config.num_hidden_layers) for kind in ("self_attn", "mlp")]
    for number, (kind, layer) in enumerate(blocks):
        norm, writer, run = {
            "self_attn": ("input_layernorm", "o_proj", attention),
            "mlp": ("post_attention_layernorm", "down_proj", feed_forward),
        }[kind]
        prefix = f"model.layers.{layer}.{kind}."
        w = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        gamma = weights[f"model.layers.{layer}.{norm}.weight"]
        for name in w:
            if name.endswith(".weight") and name != f"{writer}.weight":
                w[name] = w[name] * gamma @ basis
        outputs = [run(w, normalise(stream, full, eps)) for stream in streams]
        whole = [
            stream @ basis.T + output @ w[f"{writer}.weight"].T + w[f"{writer}.bias"]
            for stream, output in zip(streams, outputs, strict=True)
        ]
        following = leading_directions(whole[: len(calibration)], width if number < len(blocks) - 1 else full)
        shortcut, sliced_writer = basis.T @ following, following.T @ w[f"{writer}.weight"]
        streams = [
            stream @ shortcut + output @ sliced_writer.T + w[f"{writer}.bias"] @ following
            for stream, output in zip(streams, outputs, strict=True)
        ]
        basis = following
    head = weights["lm_head.weight"] * weights["model.norm.weight"] @ basis
    return np.stack([normalise(stream, full, eps) @ head.T for stream in streams[len(calibration) :]])


@pytest.mark.parametrize("sparsity", [0.25, 0.5])
def test_slicing_follows_the_published_algorithm(sparsity):
    model = tiny_model("llama")
    calibration, ids = tokens(6, 32, seed=1), tokens(2, 17)
    sliced = slice_model(model, [calibration[:4], calibration[4:]], sparsity=sparsity, progress=False)
    width = sliced.model.layers[0].self_attn.q_proj.in_features
    expected = slice_and_run(model, calibration.numpy(), ids.numpy(), width)
    with torch.no_grad():
        actual = sliced(ids).logits.double().numpy()
    assert np.abs(actual - expected).max() <= 1e-4 * np.ptp(expected)
    assert np.abs(model(ids).logits.detach().numpy() - expected).max() > 0.05 * np.ptp(expected)
