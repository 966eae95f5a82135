"""slicegpt-fast: slice transformer language models and run them on kernels made for their widths."""

import sys
from pathlib import Path

# Whoever imports the package has the sliced format registered with transformers from then on, whichever of the two is
# imported first; that takes seconds, since it imports torch. The console script alone is spared it until a command
# imports what it needs, so that --help is quick. Python imports a package before the script's own module in it, so the
# script is known by its file; under another name it is only slower.
if Path(getattr(sys.modules.get("__main__"), "__file__", None) or "").name != "slicegpt-fast":
    from slicegpt_fast.calibration import token_batches
    from slicegpt_fast.checkpoint import load_model, load_tokenizer, save_model
    from slicegpt_fast.errors import InputError
    from slicegpt_fast.evaluation import perplexity
    from slicegpt_fast.export import export_graph, export_plain
    from slicegpt_fast.patching import patch_model, patch_report, unpatch_model
    from slicegpt_fast.published import import_reference
    from slicegpt_fast.recovery import recover_model
    from slicegpt_fast.slicing import SliceOptions, dequantize_model, quantize_model, slice_model
    from slicegpt_fast.streaming import slice_checkpoint

__all__ = [
    "InputError",
    "SliceOptions",
    "dequantize_model",
    "export_graph",
    "export_plain",
    "import_reference",
    "load_model",
    "load_tokenizer",
    "patch_model",
    "patch_report",
    "perplexity",
    "quantize_model",
    "recover_model",
    "save_model",
    "slice_checkpoint",
    "slice_model",
    "token_batches",
    "unpatch_model",
]
