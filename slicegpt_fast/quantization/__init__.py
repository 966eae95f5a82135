"""Models whose weights have 8 or 4 bits."""

from slicegpt_fast.quantization.linear import STORED, Quantized, QuantizedEmbedding, QuantizedLinear, count_parameters
from slicegpt_fast.quantization.plan import (
    Precision,
    all_linears,
    check_plain,
    forget_ties_,
    name_parameters_,
    outline_,
    quantized_modules,
    readers,
    replace_,
    replace_linear_,
    replace_tables_,
    writers,
)
from slicegpt_fast.quantization.rounding import round_nearest, round_with_feedback

__all__ = [
    "STORED",
    "Precision",
    "Quantized",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "all_linears",
    "check_plain",
    "count_parameters",
    "forget_ties_",
    "name_parameters_",
    "outline_",
    "quantized_modules",
    "readers",
    "replace_",
    "replace_linear_",
    "replace_tables_",
    "round_nearest",
    "round_with_feedback",
    "writers",
]
