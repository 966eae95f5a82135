"""What decides how a kernel works: how many rows a call has, and what is done to the sums before they are written."""

from typing import Literal

# "decode": at most DECODE_ROWS rows, bound by streaming the weight; "prefill": more; "tall": any number, no weight.
Regime = Literal["decode", "prefill", "tall"]
# An activation of norm_linear, how residual_linear takes the stream in, or that covariance_ scales its rows.
Activation = Literal["relu", "gelu", "gelu_tanh", "silu_gate"]
Residual = Literal["add", "dense", "low rank"]
Epilogue = Literal[Activation, Residual, "row scale"]
# How a matmul's weight is stored: in the dtype of the activations, or quantised as ops/quantized.py describes it.
WeightFormat = Literal["full", "int8", "int4"]

DECODE_ROWS = 16  # up to this many rows a matmul is bound by streaming its weight
TILE = {"cuda": 64, "cpu": 16}  # widths that fill a tile: the K step of a tensor-core tile, an AVX-512 register of fp32


def matmul_regime(rows: int) -> Regime:
    """Return the regime of a matmul of that many rows by a weight."""
    return "decode" if rows <= DECODE_ROWS else "prefill"
