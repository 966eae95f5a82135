"""Triton kernels of the three ops; installed as ``slicegpt_fast.triton_kernels``."""
