"""What is known of the Hugging Face families: a table with one row per family, and a model read through its row."""

from slicegpt_fast.architectures.decoder import Decoder, Site, evaluating
from slicegpt_fast.architectures.table import (
    AXES,
    Architecture,
    Axis,
    Branch,
    Heads,
    Output,
    Reader,
    Sublayer,
    architecture_of,
)
from slicegpt_fast.architectures.weights import Weight, at, embedding_scale, weights

__all__ = [
    "AXES",
    "Architecture",
    "Axis",
    "Branch",
    "Decoder",
    "Heads",
    "Output",
    "Reader",
    "Site",
    "Sublayer",
    "Weight",
    "architecture_of",
    "at",
    "embedding_scale",
    "evaluating",
    "weights",
]
