"""What was measured on GPUs: for each GPU, op and shape, the microseconds of every backend and Triton's best tile.

Two JSON files of one form: ``tuned.json`` beside this one, and before it the user's own
(``$XDG_CACHE_HOME/slicegpt-fast/tuned.json``), which `slicegpt-fast tune` writes:

    {"NVIDIA H200": {"norm_linear": {"bfloat16 M<=1 N=22016 K=2872 silu_gate": {
        "us": {"reference": 61.2, "triton": 31.0, "cuda": 27.9},
        "tile": {"m": 16, "n": 128, "k": 64, "warps": 4, "stages": 4}}}}}

An entry of another form, such as one of an older version, counts as not measured. Beside the ops of a GPU stands
``"passed"``: the backends whose kernels all passed `slicegpt-fast tune --quick` there, each with the revision that did.
"""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

# A call of M rows uses the measurement of the smallest of these that is at least M; more rows use the last one's.
BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
PASSED = "passed"


@dataclass(frozen=True)
class Entry:
    """Microseconds of each backend at a shape, and the tile that Triton's were measured with, where it has a choice."""

    us: dict[str, float]
    tile: dict[str, int] | None = None


@lru_cache
def gpu_name(device: torch.device) -> str:
    """Return the key of a device's measurements."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@lru_cache(maxsize=4096)
def bucket(dtype: torch.dtype, shape: tuple[int, int, int], epilogue: str | None) -> str:
    """Return the key of a shape (rows, n, k): rows rounded up to one of BUCKETS, the widths as they are."""
    rows, n, k = shape
    rows = next((most for most in BUCKETS if most >= rows), BUCKETS[-1])
    return " ".join([f"{str(dtype).removeprefix('torch.')} M<={rows} N={n} K={k}", *([epilogue] if epilogue else [])])


def user_table() -> Path:
    """Return where `slicegpt-fast tune` keeps what it measured on this machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slicegpt-fast" / "tuned.json"


def lookup(gpu: str, op: str, shape_bucket: str) -> Entry | None:
    """Return what was measured there, or None."""
    for table in _tables():
        found = _section(table, gpu, op).get(shape_bucket)
        us = found.get("us") if isinstance(found, dict) else None
        if found is not None and isinstance(us, dict) and all(isinstance(time, int | float) for time in us.values()):
            return Entry(us, found.get("tile"))
    return None


def buckets(gpu: str, op: str) -> set[str]:
    """Return the keys of all that was measured of an op."""
    return {key for table in _tables() for key in _section(table, gpu, op) if lookup(gpu, op, key)}


def record(gpu: str, op: str, shape_bucket: str, entry: Entry) -> None:
    """Add a measurement to the user's table, written beside it and renamed."""
    _write(gpu, op, shape_bucket, {"us": entry.us, "tile": entry.tile})


def passed(gpu: str, backend: str, revision: str) -> bool:
    """Return whether all kernels of ``backend``, built from ``revision``, passed their checks on this machine's GPU."""
    return any(_section(table, gpu, PASSED).get(backend) == revision for table in _tables())


def record_passed(gpu: str, backend: str, revision: str | None) -> None:
    """Note that the kernels of a backend passed, or with None that they did not."""
    _write(gpu, PASSED, backend, revision)


def _write(gpu: str, section: str, key: str, value: Any) -> None:
    path = user_table()
    table = _read(path)
    _section(table, gpu, section)[key] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    beside.replace(path)
    _tables.cache_clear()


@lru_cache
def _tables() -> tuple[dict[str, Any], ...]:
    return _read(user_table()), _read(Path(__file__).with_name("tuned.json"))


def _read(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text())
        assert isinstance(table, dict)
        return table
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, AssertionError):
        warnings.warn(f"{path} is no table of measurements and counts as empty: run slicegpt-fast tune.", stacklevel=2)
        return {}


def _section(table: dict[str, Any], gpu: str, op: str) -> dict[str, Any]:
    """Return a GPU's measurements of an op, to be read and to be added to."""
    for key in (gpu, op):
        if not isinstance(table.get(key), dict):
            table[key] = {}
        table = table[key]
    return table
