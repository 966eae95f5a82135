"""The tests of an op run on each backend.

``backend`` and ``dtype`` are parameters of every test that names them. Where there is no GPU, Triton kernels run in
their interpreter (tests/conftest.py), and CUDA kernels in the emulator (tests/emulator).
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from emulator.emulate import CXX, emulating
from ops.accuracy import device_of

HALF = [torch.float16, torch.bfloat16]
KERNELS = {
    "cpu": [*HALF, torch.float32],
    "triton": [*(HALF if torch.cuda.is_available() else HALF[:1]), torch.float32],  # interpreted bf16 is garbage
}
if torch.cuda.is_available() or CXX:
    KERNELS["cuda"] = HALF


@pytest.fixture(autouse=True)
def emulator(request: pytest.FixtureRequest) -> Iterator[None]:
    """Lets the backend "cuda" run in the emulator, as on Hopper, where there is no GPU."""
    case = getattr(request.node, "callspec", None)
    emulates = case is not None and case.params.get("backend") == "cuda" and not torch.cuda.is_available()
    with emulating("90a") if emulates else nullcontext():
        yield


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Where the test's backend runs."""
    return device_of(request.getfixturevalue("backend") if "backend" in request.fixturenames else "triton")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder in place of the user's, for the tuning table."""
    from slicegpt_fast.kernels import measured
    from slicegpt_fast.triton_kernels import tiles

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for clear in (measured._tables.cache_clear, tiles.choose_tile.cache_clear):
        clear()
    yield tmp_path
    for clear in (measured._tables.cache_clear, tiles.choose_tile.cache_clear):
        clear()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    own = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    names = [x for x in ("backend", "dtype") if x in metafunc.fixturenames and not any(x in named for named in own)]
    if names == ["backend", "dtype"]:
        cases = [(backend, dtype) for backend, dtypes in KERNELS.items() for dtype in dtypes]
    else:
        cases = list(KERNELS) if names == ["backend"] else KERNELS["triton"]
    if names:
        metafunc.parametrize(",".join(names), cases, ids=lambda x: str(x).removeprefix("torch."))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Iterator[None]:
    """Skips what the CUDA kernels refuse on this GPU; the emulated one takes all that is asked of it."""
    from slicegpt_fast.errors import InputError

    try:
        return (yield)
    except InputError as error:
        if torch.cuda.is_available() and str(error).startswith("backend 'cuda' cannot run"):
            pytest.skip(str(error))
        raise
