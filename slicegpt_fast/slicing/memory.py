"""What memory there is."""

import math
from pathlib import Path

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> float:
    """Return how many bytes of the device's memory are free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, _free_in_cgroup())


def _free_in_cgroup() -> float:
    """Bytes that are left of the limit of this process's container (cgroup v2), infinite where it has none."""
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except OSError:
        return math.inf
    return math.inf if limit == "max" else int(limit) - int(used) + int(stat["inactive_file"])
