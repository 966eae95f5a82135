"""A patched model on a GPU, on each kind of kernels: as good as unpatched, eagerly and in CUDA graphs."""

import copy

import pytest
import torch
from models import tiny_model, tokens
from transformers import PreTrainedModel

from slicegpt_fast import InputError, patch_model, slice_model

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
PROMPTS = {"prefill": tokens(4, 33, seed=1), "decode": tokens(3, 1, seed=2)}
PLANS = {"dense shortcut": {}, "low rank": dict(shortcut="aligned", shortcut_rank=5), "shared": dict(basis="shared")}


class Case:
    """A small sliced model in bf16, patched, and how far from exact logits it may be."""

    def __init__(self, backend: str, plan: str) -> None:
        sliced = slice_model(
            tiny_model(num_hidden_layers=2), [tokens(4, 32)], sparsity=0.2, **PLANS[plan], progress=False
        )
        self.unpatched = sliced.to(DEVICE, torch.bfloat16)
        self.exact = copy.deepcopy(self.unpatched).double()
        self.patched = copy.deepcopy(self.unpatched)
        try:
            patch_model(self.patched, backend=backend, strict=True)
        except InputError as error:
            if "cannot run" not in str(error):
                raise
            pytest.skip(str(error))

    def check(self, logits: torch.Tensor, ids: torch.Tensor) -> None:
        """Of the last positions: the largest error is at most twice the unpatched model's, and a rounding."""
        exact = logits_of(self.exact, ids)
        unpatched = (logits_of(self.unpatched, ids).double() - exact).abs().max()
        rounding = torch.finfo(torch.bfloat16).eps * (exact.max() - exact.min())
        assert (logits.double() - exact[:, -logits.shape[1] :]).abs().max() <= 2 * unpatched + rounding


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(ids.to(DEVICE)).logits


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    return request.param


@pytest.mark.parametrize("plan", PLANS)
def test_as_good_as_unpatched(backend, plan):
    case = Case(backend, plan)
    for ids in PROMPTS.values():
        case.check(logits_of(case.patched, ids), ids)


@pytest.mark.parametrize("cache", ["dynamic", "static"])  # with the static one, generate compiles and captures
def test_greedy_generation(backend, cache):
    case, ids = Case(backend, "low rank"), tokens(2, 19, seed=1).to(DEVICE)
    case.patched.generation_config.eos_token_id = None
    options = dict(do_sample=False, max_new_tokens=12, pad_token_id=0, cache_implementation=cache)
    for _ in range(2):  # captured, then replayed
        found = case.patched.generate(
            ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, output_logits=True, **options
        )
        logits = torch.stack(found.logits, dim=1)
        assert torch.equal(logits.argmax(-1), found.sequences[:, 19:])
        case.check(logits, found.sequences[:, :-1])


@pytest.mark.parametrize("phase", PROMPTS)
def test_cuda_graphs_of_torch_compile(backend, phase, monkeypatch):
    monkeypatch.setattr(torch._inductor.config.triton, "cudagraph_or_error", True)  # it would only warn
    case = Case(backend, "low rank")
    compiled = torch.compile(case.patched, mode="reduce-overhead")
    for seed in range(4):  # compiled, warmed up, captured, replayed
        ids = tokens(*PROMPTS[phase].shape, seed=seed)
        torch.compiler.cudagraph_mark_step_begin()
        case.check(logits_of(compiled, ids).clone(), ids)
