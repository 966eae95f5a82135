"""slicegpt-fast: slice transformer language models and run them on kernels made for their widths."""

from slicegpt_fast.calibration import token_batches
from slicegpt_fast.checkpoint import load_model, load_tokenizer, save_model
from slicegpt_fast.errors import InputError
from slicegpt_fast.evaluation import perplexity
from slicegpt_fast.export import export_plain
from slicegpt_fast.patching import patch_model, patch_report, unpatch_model
from slicegpt_fast.published import import_reference
from slicegpt_fast.slicing import slice_model
from slicegpt_fast.streaming import slice_checkpoint

__all__ = [
    "InputError",
    "export_plain",
    "import_reference",
    "load_model",
    "load_tokenizer",
    "patch_model",
    "patch_report",
    "perplexity",
    "save_model",
    "slice_checkpoint",
    "slice_model",
    "token_batches",
    "unpatch_model",
]
