"""Integer cells in which the blocks of a kernel count themselves in, so that the last one knows that it is the last."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


class _Counters:
    """Zeroed int32 cells that every launch leaves zeroed; None for a launch that needs none.

    Launches on one stream run one after the other and share cells. A CUDA graph may be replayed on any stream beside
    any other launch, so a launch under capture gets cells of its own for good, from a pool that launches outside of
    captures fill up.
    """

    LINE = 32  # cells: all are as aligned as the first, for Triton compiles anew, even in a capture, what is not
    FEWEST, POOL = 1 << 10, 1 << 16

    def __init__(self) -> None:
        self._by_stream: dict[tuple[torch.device, int], Tensor] = {}
        self._pools: dict[torch.device, Tensor] = {}
        self._kept: list[Tensor] = []  # everything that launches and graphs know addresses in

    def __call__(self, count: int, device: torch.device) -> Tensor | None:
        if count == 0:
            return None
        count = -(-count // self.LINE) * self.LINE
        stream = 0
        if device.type == "cuda":
            pool = self._pools.get(device)
            if torch.cuda.is_current_stream_capturing():
                if pool is None or pool.numel() < count:
                    return torch.zeros(count, dtype=torch.int32, device=device)  # anew at every replay
                self._pools[device] = pool[count:]
                return pool[:count]
            if pool is None or pool.numel() < self.POOL // 2:
                self._pools[device] = self._zeros(self.POOL, device)
            stream = torch.cuda.current_stream(device).cuda_stream
        cells = self._by_stream.get((device, stream))
        if cells is None or cells.numel() < count:
            cells = self._by_stream[device, stream] = self._zeros(max(count, self.FEWEST), device)
        return cells

    def _zeros(self, count: int, device: torch.device) -> Tensor:
        """Cells that outlive the call, and are zero for every stream.

        Another thread allocates them: torch.compile, before it captures a graph, lets this one allocate from the
        graph's memory, where nothing may stay.
        """

        def allocate() -> Tensor:
            cells = torch.zeros(count, dtype=torch.int32, device=device)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return cells

        with ThreadPoolExecutor(1) as thread:
            self._kept.append(cells := thread.submit(allocate).result())
        return cells


counters = _Counters()
