"""What a plan keeps of a model, in words."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from slicegpt_fast.architectures import Decoder
from slicegpt_fast.slicing.plan import SlicePlan, dense_sizes


def span(sizes: Sequence[int]) -> str:
    """One size for all, as "512", or the range of several, as "480 to 560"."""
    low, high = min(sizes), max(sizes)
    return f"{low}" if low == high else f"{low} to {high}"


def kept_directions(plan: SlicePlan) -> str:
    """The kept sizes of the norms in the decoder layers, as "512 of 576" or "480 to 560 of 576"."""
    return f"{span(plan.widths[:-1])} of {plan.full_width}"


def kept_sizes(dense: PreTrainedModel, plan: SlicePlan) -> str:
    """What a cut kept, as "channels 512 to 1536 of 1536, values 24 to 64 of 64, stream 576 of 576"."""
    full = dense_sizes(Decoder(dense))
    cut = [f"{axis} {span(plan.sizes(axis))} of {span(full[axis])}" for axis in full if plan.sizes(axis)]
    return ", ".join([*cut, f"stream {kept_directions(plan)}"])


def shortcuts(plan: SlicePlan) -> str:
    """What stands on the residual path, as "aligned shortcuts of rank 36 at most"."""
    rank = "" if plan.shortcut_rank is None else f" of rank {plan.shortcut_rank} at most"
    return f"{plan.shortcut} shortcuts{rank}" if len(set(plan.groups)) > 1 else f"no shortcuts{rank}"
