"""The language head of a patched model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slicegpt_fast.ops.dispatch import DECODE_ROWS
from slicegpt_fast.ops.norm_linear import norm_linear
from slicegpt_fast.patching.layers import Forward, NotFusable, Requests, infers, requests


class FusedHead:
    """The forward of the head: up to DECODE_ROWS rows on the kernels of ``norm_linear``, more on torch's matmul."""

    def __init__(self, linear: nn.Module, backend: str) -> None:
        """
        Raises:
            NotFusable: the head is no plain linear layer.
        """
        if type(linear) is not nn.Linear or "forward" in linear.__dict__:
            raise NotFusable("it is no plain linear layer")
        self.module: nn.Linear = linear
        self.backend = backend
        self.forwards: dict[nn.Module, Forward] = {linear: self.forward}
        self.copied_bytes = 0

    def requests(self) -> Requests:
        """What the op is asked for in decode; prefill is torch's."""
        weight = self.module.weight
        ((decode, _),) = requests("norm_linear", weight, (weight.shape[0], weight.shape[1]))
        return [(decode, None)]

    def offloaded(self) -> bool:
        """True where the weight is not here."""
        return self.module.weight.device.type == "meta"

    def changed(self) -> str | None:
        """Nothing can happen to the head that its fused form does not honour."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        linear, rows = self.module, x.shape[:-1].numel()
        if rows > DECODE_ROWS or not infers(linear, [linear.weight], x):
            return nn.Linear.forward(linear, x)
        # The norm is already done: a sum of squares of zero and an eps of one make the row scale one.
        sumsq = torch.zeros(rows, dtype=torch.float32, device=x.device)
        y = norm_linear(x.reshape(rows, -1), linear.weight, linear.bias, 1.0, 1, sumsq, backend=self.backend)
        return y.view(*x.shape[:-1], -1)
