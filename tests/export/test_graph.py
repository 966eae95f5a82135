"""The graphs of other runtimes compute what the model computes, prompts and decode steps alike."""

from types import SimpleNamespace

import pytest
import torch
from models import tiny_model, tokens
from texts import word_tokenizer
from transformers import AutoConfig
from transformers.exporters import ExportedModel

from slicegpt_fast import InputError, export_graph, load_tokenizer, patch_model, slice_model

# Of log-probabilities, in fp32.
TOLERANCE = 1e-4
PLANS = {
    "shortcuts": dict(sparsity=0.27, round_to=1, basis="per-norm"),
    "aligned": dict(sparsity=0.25, shortcut="aligned", shortcut_rank=3),
    "cut": dict(target_params=0.8, round_to=8),
}
CASES = [
    ("llama", "shortcuts", torch.float32),
    ("qwen3", "cut", torch.bfloat16),  # in training mode
    ("opt", "aligned", torch.float32),
]


def sliced_model(family="llama", plan="shortcuts", **options):
    return slice_model(tiny_model(family, **options), [tokens(4, 32, seed=1)], progress=False, **PLANS[plan])


class OnnxGraph:
    """A graph on ONNX Runtime; the cache goes in and comes out."""

    def __init__(self, folder):
        import onnxruntime

        self.session = onnxruntime.InferenceSession(folder / "model.onnx")

    def start(self, rows):
        caches = self.session.get_inputs()[2:]
        shapes = [(rows, each.shape[1], 0, each.shape[3]) for each in caches]
        self.cache = {each.name: torch.zeros(shape).numpy() for each, shape in zip(caches, shapes, strict=True)}

    def __call__(self, ids, mask):
        feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), **self.cache}
        logits, *cache = self.session.run(None, feed)
        self.cache = dict(zip(self.cache, cache, strict=True))
        return torch.from_numpy(logits)


class OpenVinoGraph:
    """A graph on OpenVINO; the cache is a request's state."""

    def __init__(self, folder):
        import openvino

        options = {"INFERENCE_PRECISION_HINT": "f32"}
        self.compiled = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", options)

    def start(self, rows):
        self.request = self.compiled.create_infer_request()

    def __call__(self, ids, mask):
        rows = torch.arange(len(ids), dtype=torch.int32)
        feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "beam_idx": rows.numpy()}
        return torch.from_numpy(self.request.infer(feed)["logits"].copy())


GRAPHS = {"onnx": OnnxGraph, "openvino": OpenVinoGraph}


def check_graph(graph, model):
    """Prompts of several sizes, one with padding, each with two steps behind it: against the model in fp64."""
    model = model.double()
    for ids, padding in ((tokens(3, 30, seed=2), 0), (tokens(1, 3), 0), (tokens(2, 9, seed=3), 4)):
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        exact = model(ids, attention_mask=mask).logits.log_softmax(-1)
        graph.start(len(ids))
        end = ids.shape[1] - 2
        steps = [slice(0, end), slice(end, end + 1), slice(end + 1, end + 2)]
        logits = torch.cat([graph(ids[:, step], mask[:, : step.stop]) for step in steps], 1)
        error = (logits.double().log_softmax(-1) - exact).abs()
        assert error[mask.bool()].max() <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("runtime", GRAPHS)
@pytest.mark.parametrize(("family", "plan", "dtype"), CASES)
@torch.no_grad()
def test_graph_computes_the_model(family, plan, dtype, runtime, tmp_path, capfd):
    """In fp32 whatever the model's dtype; the model stays as it was."""
    model = sliced_model(family, plan).to(dtype).train(dtype != torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_graph(model, tmp_path / "graph", word_tokenizer(), runtime=runtime)
    assert capfd.readouterr().out == ""
    assert model.training == (dtype != torch.float32)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    check_graph(GRAPHS[runtime](tmp_path / "graph"), model.eval())

    assert not hasattr(AutoConfig.from_pretrained(tmp_path / "graph"), "quantization_config")
    assert load_tokenizer(tmp_path / "graph")("the cat").input_ids == word_tokenizer()("the cat").input_ids
    stock = ExportedModel.from_pretrained(tmp_path / "graph")
    assert stock.export_format == runtime
    assert stock.dtype == torch.float32


class TestRefusals:
    def refused(self, match, folder, model=None, runtime="onnx"):
        with pytest.raises(InputError, match=match):
            export_graph(model or tiny_model(), folder / "graph", runtime=runtime)
        assert list(folder.iterdir()) == []

    def test_patched(self, tmp_path):
        model = patch_model(tiny_model(), check=False)
        self.refused(r"^the model is patched, .*: call unpatch_model first\.$", tmp_path, model)

    def test_unknown_runtime(self, tmp_path):
        self.refused(r"^runtime must be one of 'onnx', 'openvino', not 'mlx'\.$", tmp_path, runtime="mlx")

    def test_missing_package(self, tmp_path, monkeypatch):
        monkeypatch.setattr("slicegpt_fast.errors.find_spec", lambda name: None if name == "openvino" else name)
        match = r"^the package openvino is not installed: pip install 'slicegpt-fast\[openvino\]' brings it\.$"
        self.refused(match, tmp_path, runtime="openvino")

    def test_transformers_without_exporters(self, tmp_path, monkeypatch):
        monkeypatch.setattr("slicegpt_fast.export.graph.transformers", SimpleNamespace(__version__="5.17.0"))
        self.refused(r"^transformers 5\.17\.0 cannot export graphs: pip install 'transformers>=5\.19'\.$", tmp_path)

    def test_full_folder(self, tmp_path):
        (tmp_path / "notes").write_text("mine")
        with pytest.raises(InputError, match="exists and is not an empty folder"):
            export_graph(tiny_model(), tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["notes"]

    def test_no_language_model(self, tmp_path):
        self.refused("model must be a transformers causal language model", tmp_path, torch.nn.Linear(2, 2))
