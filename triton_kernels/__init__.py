"""Triton kernels of the ops; installed as ``slicegpt_fast.triton_kernels``."""
