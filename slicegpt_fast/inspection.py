"""What a model is, from its config alone."""

from slicegpt_fast.checkpoint import load_skeleton
from slicegpt_fast.errors import InputError
from slicegpt_fast.evaluation import stored_bytes, stored_parameters
from slicegpt_fast.slicing import SlicePlan, block_parameters, slice_config_of
from slicegpt_fast.slicing.format import shape_
from slicegpt_fast.slicing.summary import kept_directions, kept_sizes, shortcuts
from slicegpt_fast.tables import decimal


def describe(source: str) -> dict[str, str]:
    """Return what a model is, dense or sliced, from its config alone: no weight is read.

    Args:
        source: a hub id or a local folder.

    Raises:
        InputError: there is no config of a causal language model.
    """
    model = load_skeleton(source)
    config = model.config
    facts = {"model type": config.model_type, "dtype": str(config.dtype or "not recorded")}
    try:
        dense_blocks = block_parameters(model)
    except InputError as error:
        return {**facts, "sliced": f"no, and it cannot be: {error}"}
    if slice_config := slice_config_of(config):
        plan, precision = slice_config.plan(), slice_config.rounding()
        facts |= {"sliced": _basis(plan), "calibrated on": f"{slice_config.calibration_tokens} tokens"}
        if plan.cuts_layers:
            facts["sizes kept"] = kept_sizes(model, plan)
        elif plan.cuts:
            facts["directions kept"] = f"{kept_directions(plan)}, {plan.widths[-1]} at the head"
        if precision is not None:
            facts["weights"] = str(precision)
        shape_(model, slice_config)
    else:
        facts["sliced"] = "no, but it can be"
    blocks = block_parameters(model)
    return {
        **facts,
        "stored parameters": decimal(stored_parameters(model)),
        "  in decoder blocks": f"{decimal(blocks)} ({blocks / dense_blocks:.3f} of the dense model's)",
        "bytes": f"{decimal(stored_bytes(model))}B",
    }


def _basis(plan: SlicePlan) -> str:
    """How the residual stream was sliced, if it was."""
    if not plan.cuts:
        return "no"
    if plan.basis is None:
        return "in its layers; the residual stream is the dense model's"
    return f"{plan.basis} basis, {plan.signal} signal, {shortcuts(plan)}"
