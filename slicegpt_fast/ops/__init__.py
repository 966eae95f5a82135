"""The three ops: one file each, with the reference formulation that every kernel is held to."""

from slicegpt_fast.ops.covariance import covariance_
from slicegpt_fast.ops.dispatch import kernel_table, use_backend

__all__ = ["covariance_", "kernel_table", "use_backend"]
