"""The ops: one file each, with the reference formulation that every kernel is held to; in backends/ what runs them."""

from slicegpt_fast.ops.attend import attend
from slicegpt_fast.ops.backends import cpu, cuda, triton  # noqa: F401  each registers what it runs
from slicegpt_fast.ops.covariance import covariance_
from slicegpt_fast.ops.dispatch import kernel_table, use_backend
from slicegpt_fast.ops.norm_linear import norm_linear
from slicegpt_fast.ops.residual_linear import residual_linear

__all__ = ["attend", "covariance_", "kernel_table", "norm_linear", "residual_linear", "use_backend"]
