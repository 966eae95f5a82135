"""Integer cells in which the blocks of a kernel count themselves in, so that the last one knows that it is the last."""

from __future__ import annotations

import torch


class _Counters:
    """Zeroed int32 cells that every launch leaves zeroed.

    Launches on one stream run one after the other and share cells. A CUDA graph may be replayed on any stream beside
    any other launch, so a launch under capture gets cells of its own for good.
    """

    POOL = 1 << 16

    def __init__(self) -> None:
        self._by_stream: dict[tuple[torch.device, int], torch.Tensor] = {}
        self._pools: dict[torch.device, torch.Tensor] = {}

    def __call__(self, count: int, device: torch.device) -> torch.Tensor:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            pool = self._pools.get(device)
            if pool is None or pool.numel() < count:
                return torch.zeros(count, dtype=torch.int32, device=device)
            self._pools[device] = pool[count:]
            return pool[:count]
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        cells = self._by_stream.get((device, stream))
        if cells is None or cells.numel() < count:
            cells = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
            self._by_stream[device, stream] = cells
            if device.type == "cuda" and device not in self._pools:
                self._pools[device] = torch.zeros(self.POOL, dtype=torch.int32, device=device)
                torch.cuda.synchronize(device)  # once: a graph captured on another stream must find zeros
        return cells


counters = _Counters()
