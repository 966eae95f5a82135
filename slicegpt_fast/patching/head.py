"""The language head of a patched model."""

from __future__ import annotations

from torch import Tensor, nn

from slicegpt_fast.kernels.regimes import DECODE_ROWS
from slicegpt_fast.ops.norm_linear import norm_linear
from slicegpt_fast.patching.layers import DTYPES, Forward, NotFusable, Requests, infers, is_plain, normalised, requests


class FusedHead:
    """The forward of the head: up to DECODE_ROWS rows on the kernels of ``norm_linear``, more on torch's matmul."""

    def __init__(self, linear: nn.Module, backend: str) -> None:
        """
        Raises:
            NotFusable: the head is no plain linear layer.
        """
        if type(linear) is not nn.Linear or not is_plain(linear):
            raise NotFusable("it is no plain linear layer")
        if type(linear.weight.data) is not Tensor or linear.weight.dtype not in DTYPES:
            raise NotFusable(f"its weight is quantised or of dtype {linear.weight.dtype}")
        self.module: nn.Linear = linear
        self.backend = backend
        self.forwards: dict[nn.Module, Forward] = {linear: self.forward}

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
        linear, shape = self.module, x.shape[:-1]
        rows = shape.numel()
        if not 0 < rows <= DECODE_ROWS or not infers(linear, [linear.weight], x):
            return nn.Linear.forward(linear, x)
        x = x.reshape(rows, -1)  # the final norm has been done
        y = norm_linear(x, linear.weight, linear.bias, *normalised(x), backend=self.backend)
        return y.view(*shape, -1)
