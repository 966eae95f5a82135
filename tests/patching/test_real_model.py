"""SmolLM2-135M, sliced and patched, says what it said unpatched."""

import pytest
import torch

from slicegpt_fast import load_model, load_tokenizer, patch_model, patch_report, slice_model, unpatch_model
from slicegpt_fast.calibration import batched, join_documents, token_windows
from slicegpt_fast.quickstart import PROMPT, smollm2, wikipedia_leads


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "plan",
    [dict(basis="shared"), dict(basis="per-norm", shortcut="aligned", shortcut_rank=36)],
    ids=["shared", "aligned"],
)
def test_the_same_greedy_text(plan):
    tokenizer = load_tokenizer(smollm2())
    text = join_documents(wikipedia_leads()[:300])
    calibration = batched(token_windows(tokenizer, text, 512, count=8)[:8])
    model = slice_model(load_model(smollm2()), calibration, target_params=0.85, **plan, progress=False)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    options = dict(max_new_tokens=64, min_new_tokens=64, do_sample=False)
    expected = model.generate(ids, **options)
    patch_model(model)
    assert patch_report(model).fused == 61
    assert torch.equal(model.generate(ids, **options), expected)
    assert torch.equal(unpatch_model(model).generate(ids, **options), expected)
