"""Counter cells: zero, shared on a stream, a graph's own, and never in the memory of a graph."""

import threading
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from slicegpt_fast.kernels.counters import _Counters, counters

CUDA = torch.device("cuda", 0)


def test_cells_start_zero_and_are_shared(device):
    cells = counters(5, torch.device(device))
    assert cells.dtype == torch.int32
    assert (cells == 0).all()
    assert counters(3, torch.device(device)).data_ptr() == cells.data_ptr()
    assert counters(0, torch.device(device)) is None


@pytest.fixture
def gpu(monkeypatch):
    """Stands in for a GPU, with its cells on the host: the number of a stream, whether it captures, who allocates."""
    state = SimpleNamespace(stream=0, capturing=False, allocations=[])
    zeros = torch.zeros

    def on_host(count, *, dtype, device):
        assert device == CUDA
        state.allocations.append(threading.get_ident())
        return zeros(count, dtype=dtype)

    monkeypatch.setattr(torch, "zeros", on_host)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=state.stream))
    return state


def test_each_stream_has_cells_that_grow(gpu):
    counters = _Counters()
    first = counters(8, CUDA)
    gpu.stream = 1
    assert counters(8, CUDA).data_ptr() != first.data_ptr()
    gpu.stream = 0
    assert counters(8, CUDA).data_ptr() == first.data_ptr()
    assert counters(5000, CUDA).numel() >= 5000


def test_what_is_kept_is_allocated_in_another_thread(gpu):
    counters = _Counters()
    counters(8, CUDA)
    assert gpu.allocations
    assert threading.get_ident() not in gpu.allocations


def test_captures_own_their_cells_and_find_enough_of_them(gpu):
    """However many graphs are captured, as long as launches outside of them come between."""
    counters, given = _Counters(), []
    for _ in range(5):
        counters(8, CUDA)
        gpu.capturing = True
        given += [counters(count, CUDA) for count in (46, 1000, 3, 172) * 8]
        gpu.capturing = False
    assert threading.get_ident() not in gpu.allocations  # as a graph's memset would be
    assert all(cells.data_ptr() % 16 == given[0].data_ptr() % 16 for cells in given)  # by which Triton compiles
    spans = sorted((cells.data_ptr(), cells.data_ptr() + cells.nbytes) for cells in given)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
    storages = {cells.untyped_storage().data_ptr() for cells in given}
    assert storages <= {cells.data_ptr() for cells in counters._kept}  # a graph has addresses alone


@pytest.mark.gpu
def test_captured_launches_own_their_cells():
    graph = torch.cuda.CUDAGraph()
    counters(8, CUDA)
    with torch.cuda.graph(graph):
        first, second = (counters(8, CUDA) for _ in range(2))
    assert first.data_ptr() + 8 * 4 <= second.data_ptr()
    assert first.data_ptr() % 16 == second.data_ptr() % 16 == 0


@pytest.mark.gpu
def test_no_cells_stay_in_a_pool_that_this_thread_allocates_from():
    """As torch.compile warms up for a CUDA graph."""
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool), torch.cuda.stream(torch.cuda.Stream()):
        mine, cells = torch.zeros(8, device=CUDA), _Counters()(8, CUDA)
    spans = [(segment["address"], segment["address"] + segment["total_size"]) for segment in pool.snapshot()]
    assert any(begin <= mine.data_ptr() < end for begin, end in spans)
    assert not any(begin <= cells.data_ptr() < end for begin, end in spans)
