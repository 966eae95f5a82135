"""What slicing a checkpoint from file to file takes: memory, activations, disk; and what of them there is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slicegpt_fast.architectures import Decoder, at
from slicegpt_fast.errors import check_choice
from slicegpt_fast.ops.covariance import ROWS_PER_STEP
from slicegpt_fast.slicing import SliceOptions, SlicePlan
from slicegpt_fast.slicing.memory import free_memory
from slicegpt_fast.slicing.rotation import parts

Activations = Literal["auto", "device", "memory", "disk"]
OVERHEAD = 3 * 2**23  # the model's modules without weights, and what libraries allocate once
FREE_SHARE = 0.9  # of free memory that activations, or a model and its sliced copy, may fill


@dataclass(frozen=True)
class Needs:
    """What slicing a checkpoint takes, in bytes, estimated from above.

    Attributes:
        working: memory of the device at the worst moment, activations aside: one layer and what is made of it.
        activations: of all calibration tokens between two layers.
        disk: the work folder, with the sliced model in it.
    """

    working: int
    activations: int
    disk: int

    def __str__(self) -> str:
        working, activations, disk = (f"{size / 1e9:.2f} GB" for size in (self.working, self.activations, self.disk))
        return f"needs up to {working} of memory, {activations} for activations and {disk} of disk"


def estimate(
    model: PreTrainedModel, plan: SlicePlan, batches: Sequence[Mapping[str, Tensor]], options: SliceOptions
) -> Needs:
    """Return what slicing ``model`` (its weights may be on the meta device) needs to be sliced with ``options``."""
    full, element = plan.full_width, model.dtype.itemsize
    square = full * full * 8  # an fp64 matrix [D, D]
    exact = 4 if element == 2 else 8  # what weights are rotated in
    weights = [[each for path in paths for each in at(model, path).parameters()] for paths in parts(Decoder(model))]
    sizes = [[each.numel() for each in part] for part in weights]
    longest = max((batch["input_ids"].numel() for batch in batches), default=0)
    widest = max(max(each.shape[-2:]) for part in weights[1:-1] for each in part)
    batch = longest * (8 * full + 4 * widest) * max(element, 4) + 2 * min(longest, ROWS_PER_STEP) * full * 8
    calibrating = max(map(sum, sizes)) * element + 6 * square + batch
    rotating = max(2 * sum(part) * element + 3 * max(part) * exact for part in sizes) + 4 * square

    streams = 2 if options.refit else 1
    activations = streams * sum(batch["input_ids"].numel() for batch in batches) * full * element
    variance, aligned = options.schedule == "variance", plan.shortcut == "aligned"
    kept = len(set(plan.groups)) * (1 + variance + aligned) + len(plan.groups) * options.refit * (1 + aligned)
    sites = range(len(plan.groups) - 1)
    stored = sum(map(sum, sizes)) + sum(plan.shortcut_parameters(site) for site in sites)
    return Needs(
        working=max(calibrating, rotating) + OVERHEAD,
        activations=activations,
        disk=2 * activations + (kept + 2) * square + stored * element,  # twice: of the last layer and the next
    )


def activations_device(activations: Activations, device: torch.device, needs: Needs) -> torch.device | None:
    """Return where the activations are kept, None for files: by default the first device that they fit into."""
    host = torch.device("cpu")
    check_choice("activations", activations, Activations)
    if activations != "auto":
        return {"device": device, "memory": host}.get(activations)
    for where in dict.fromkeys((device, host)):
        if needs.activations + (needs.working if where == device else 0) < FREE_SHARE * free_memory(where):
            return where
    return None
