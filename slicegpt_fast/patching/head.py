"""The language head of a patched model."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from slicegpt_fast.architectures import Weight
from slicegpt_fast.kernels.regimes import DECODE_ROWS
from slicegpt_fast.ops.norm_linear import norm_linear
from slicegpt_fast.patching.guards import (
    LINEAR_CODE,
    Forward,
    Guard,
    NotFusable,
    Place,
    described,
    infers,
    is_known,
    is_plain,
)
from slicegpt_fast.patching.layers import Requests, normalised, requests
from slicegpt_fast.patching.packing import DTYPES, PackedWeight
from slicegpt_fast.quantization import QuantizedLinear


class FusedHead:
    """The forward of the head: up to DECODE_ROWS rows on the kernels of ``norm_linear``, more on torch's matmul."""

    def __init__(self, place: Place, dtype: torch.dtype, backend: str) -> None:
        """``place``: where the head stands. ``dtype``: of the activations.

        Raises:
            NotFusable: the head is no plain linear layer.
        """
        _, parent, name = place
        linear = cast(nn.Linear | QuantizedLinear, parent._modules[name])
        if type(linear) not in (nn.Linear, QuantizedLinear) or not is_known(type(linear), *LINEAR_CODE):
            raise NotFusable(f"it is a {described(type(linear))}, not a plain linear layer")
        if not is_plain(linear):
            raise NotFusable("it has a forward of its own")
        self.module = linear
        self.quantized = PackedWeight([Weight(linear)]) if isinstance(linear, QuantizedLinear) else None
        self.dtype = dtype
        self.backend = backend
        self.refused: str | None = None  # why it is not to run
        self.guard = Guard((place,), {})
        self.forwards: dict[nn.Module, Forward] = {linear: self.forward}
        reason = self._unlike_a_weight()
        if reason is not None:
            raise NotFusable(reason)

    def requests(self) -> Requests:
        """What the op is asked for in decode; prefill is torch's."""
        weight = self.module.weight
        ((decode, _),) = requests("norm_linear", weight, self.dtype, (weight.shape[0], self.module.in_features))
        return [(decode, None)]

    def absent(self) -> bool:
        """True where the weight is not here."""
        return self.module.weight.device.type == "meta"

    def unfused(self) -> str | None:
        """What has happened to the head that its fused form would not honour, or None; hooks run around it."""
        return self.refused or self.guard.replaced() or self._unlike_a_weight()

    def _unlike_a_weight(self) -> str | None:
        if self.quantized is not None:
            return self.quantized.refusal()
        weight = self.module._parameters.get("weight")
        if type(weight) is nn.Parameter and weight.dtype in DTYPES:
            return None
        return "its weight is quantised or no parameter of it"

    def forward(self, x: Tensor) -> Tensor:
        linear, shape = self.module, x.shape[:-1]
        rows = shape.numel()
        if not 0 < rows <= DECODE_ROWS or not infers(linear, x) or self.unfused() is not None:
            return type(linear).forward(cast(Any, linear), x)
        x = x.reshape(rows, -1)  # the final norm has been done
        scales = linear.scales if isinstance(linear, QuantizedLinear) else None
        y = norm_linear(x, linear.weight, linear.bias, *normalised(x), scales=scales, backend=self.backend)
        return y.view(*shape, -1)
