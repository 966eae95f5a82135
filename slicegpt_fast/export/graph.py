"""Write a model as one graph for ONNX Runtime or OpenVINO, which run it without torch, transformers or this package.

The graph takes new tokens behind a cache of any length, none included: it serves prompts and decode steps alike. Its
batch, its number of new tokens and the length of its cache are free. transformers' own exporters trace it, so every
plan goes through: narrow weights and shortcuts are matmuls as any other.
"""

import copy
import sys
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
from torch.export import Dim
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from slicegpt_fast.architectures import Decoder, evaluating
from slicegpt_fast.checkpoint import check_writable, write_folder
from slicegpt_fast.errors import InputError, check_choice, check_installed
from slicegpt_fast.patching import is_patched

Runtime = Literal["onnx", "openvino"]

BATCH, PAST, NEW = 2, 5, 3  # of the example that is traced; none is 0 or 1, which torch.export would take for fixed
FREE = Dim.DYNAMIC


class Exporter(NamedTuple):
    """What writes the graphs of a runtime: a class of transformers and that of its config, and what they need.

    Attributes:
        name, config: the names of the classes.
        packages: the modules of the extra that is called as the runtime.
    """

    name: str
    config: str
    packages: tuple[str, ...]


RUNTIMES: dict[str, Exporter] = {
    "onnx": Exporter("OnnxExporter", "OnnxConfig", ("onnx", "onnxscript", "onnxruntime")),
    "openvino": Exporter("OpenVINOExporter", "OpenVINOConfig", ("openvino",)),
}


@torch.no_grad()
def export_graph(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    runtime: Runtime = "onnx",
) -> None:
    """Write a model, dense or sliced by any plan, as a graph in fp32 for another runtime.

    Inputs of the graph, for B sequences of n new tokens behind a cache of p:

    * ``input_ids`` [B, n] and ``attention_mask`` [B, p + n], both int64;
    * ONNX: ``input.past_key_values.layers.<i>.keys`` and ``.values`` [B, heads, p, head dim], fp32, and as outputs the
      same names behind ``output.``, [B, heads, p + n, head dim]. A prompt has a cache of length p = 0;
    * OpenVINO: the cache is the state of an infer request, ``beam_idx`` [B], int32, the rows that it goes on with.

    The output ``logits`` [B, n, vocabulary] is fp32.

    Args:
        model: not patched; unchanged on return. Copied where it is not in fp32 on the CPU.
        folder: does not exist yet, or is empty; it appears complete or not at all. Holds ``model.onnx`` or
            ``openvino_model.xml``, the weights, and ``export.json``, by which ``transformers.exporters`` loads it.
        tokenizer: saved beside the graph.
        runtime: "onnx" or "openvino".

    Raises:
        InputError: a model of no family that can be sliced, a patched model, an unknown runtime or one whose
            packages are not installed, a release of transformers without exporters, or a folder that cannot be written.
    """
    check_runtime(runtime)
    check_writable(folder)
    decoder = Decoder(model)
    if is_patched(model):
        raise InputError("the model is patched, and graphs are traced from unpatched ones: call unpatch_model first.")
    exporters, exporter = import_module("transformers.exporters"), RUNTIMES[runtime]
    if {each.dtype for each in model.parameters()} != {torch.float32} or model.device.type != "cpu":
        model = copy.deepcopy(model).to(device="cpu", dtype=torch.float32)  # type: ignore[call-arg]
    config = getattr(exporters, exporter.config)(dynamic_shapes=_free_sizes(len(decoder.layers)))
    with evaluating(model), redirect_stdout(sys.stderr):  # torch.onnx prints how far it is
        graph = getattr(exporters, exporter.name)().export(model, _example(model), config)
    graph.config = copy.deepcopy(model.config)
    vars(graph.config).pop("quantization_config", None)  # the graph needs nothing of the sliced format
    graph.generation_config = model.generation_config

    def write(path: Path) -> None:
        graph.save_pretrained(path)
        if tokenizer is not None:
            tokenizer.save_pretrained(path)

    write_folder(folder, write, size=model.get_memory_footprint())


def check_runtime(runtime: str) -> None:
    """Raise InputError unless ``runtime`` is one, and all that writes its graphs is installed."""
    check_choice("runtime", runtime, Runtime)
    check_installed(runtime, RUNTIMES[runtime].packages)
    if not hasattr(getattr(transformers, "exporters", None), "ExportedModel"):
        raise InputError(
            f"transformers {transformers.__version__} cannot export graphs: pip install 'transformers>=5.19'."
        )


def _example(model: PreTrainedModel) -> dict[str, Any]:
    """Tokens behind a cache, to trace the model with. Its layers are plain, sliding windows left to the mask."""
    cache = DynamicCache()
    model(torch.zeros(BATCH, PAST, dtype=torch.long), past_key_values=cache, use_cache=True)
    return {
        "input_ids": torch.zeros(BATCH, NEW, dtype=torch.long),
        "attention_mask": torch.ones(BATCH, PAST + NEW, dtype=torch.long),
        "past_key_values": cache,
        "use_cache": True,
    }


def _free_sizes(layers: int) -> dict[str, Any]:
    """The sizes of the example that a graph leaves open; a cache is its keys and values, layer by layer."""
    ids = {0: FREE, 1: FREE}
    return {"input_ids": ids, "attention_mask": ids, "past_key_values": [{0: FREE, 2: FREE}] * (2 * layers)}
