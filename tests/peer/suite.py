"""transformers' own model tests over models that are sliced or patched as they are made; run by test_peer.py.

The environment names the folder of the unpacked source distribution and what happens to each model. Of its tests only
the common ones are in the distribution: the two mixins that they import beside them stand here empty.
"""

import importlib
import inspect
import os
import sys
import types
import unittest
from functools import partialmethod
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from slicegpt_fast import patch_model, slice_model
from slicegpt_fast.architectures import architecture_of
from slicegpt_fast.slicing import slice_config_of

FOLDER, MODE = Path(os.environ["PEER_FOLDER"]), os.environ["PEER_MODE"]
VOCABULARY, BATCH, LENGTH = 99, 4, 7
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
ROTARY = SIZES | dict(max_position_embeddings=64)
FAMILIES = {
    "falcon": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False),
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "llama": ROTARY | dict(num_key_value_heads=2),
    "mixtral": ROTARY | dict(num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2),
    "opt": dict(hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4),
    "phi": ROTARY,
    "qwen3": ROTARY | dict(num_key_value_heads=2, head_dim=8),
}


class Expanded:
    """What the tests use of the package ``parameterized``: one method for each row of arguments."""

    @staticmethod
    def expand(rows):
        def decorate(function):
            namespace = inspect.currentframe().f_back.f_locals
            for number, row in enumerate(rows):
                row = row if isinstance(row, tuple | list) else (row,)
                suffix = "_".join(["", str(number), *(str(value) for value in row[:1])])
                namespace[function.__name__ + suffix] = partialmethod(function, *row)

        return decorate


def common_tests():
    """The module of the common tests, imported from the source distribution."""
    mixins = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}
    stubs = {f"tests.{module}": {name: type(name, (), {})} for module, name in mixins.items()}
    stubs |= {"tests": {}, "tests.exporters": {}, "tests.generation": {}, "parameterized": {"parameterized": Expanded}}
    for name, members in stubs.items():
        module = types.ModuleType(name)
        module.__path__ = [str(FOLDER / "tests")] if name == "tests" else []
        vars(module).update(members)
        sys.modules[name] = module
    return importlib.import_module("tests.test_modeling_common")


class SmallModel:
    """A small model of one family, as the common tests ask for it."""

    batch_size, seq_length, is_training = BATCH, LENGTH, True
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4

    def __init__(self, family):
        self.family = family

    def get_config(self):
        common = dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        return CONFIG_MAPPING[self.family](**common | FAMILIES[self.family])

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def prepare_config_and_inputs_for_model_class(self, _):
        return self.prepare_config_and_inputs_for_common()


def change(model):
    """Slice or patch a dense model in place, as MODE says."""
    if MODE.startswith("sliced"):
        ids = torch.randint(model.config.vocab_size, (8, 16), generator=torch.Generator("cpu").manual_seed(0))
        sparsity = 0.25 if MODE == "sliced" else 0
        slice_head = architecture_of(model.config).keeps_width
        training = model.training
        sliced = slice_model(model, [ids], sparsity=sparsity, slice_head=slice_head, progress=False)
        vars(model).clear()
        vars(model).update(vars(sliced.train(training)))
    if MODE.endswith("patched"):
        patch_model(model)


def usable(model):
    """Whether the weights are there: some tests keep them on the meta device, or in memory that nobody filled."""
    return all(not p.is_meta and p.isfinite().all() and p.abs().max() < 100 for p in model.parameters())


post_init = PreTrainedModel.post_init
changing = []


def changed_post_init(self):
    post_init(self)
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(self.config), None) is type(self)
    if MODE != "stock" and causal and not changing and slice_config_of(self) is None and usable(self):
        changing.append(self)
        try:
            change(self)
        finally:
            changing.pop()


PreTrainedModel.post_init = changed_post_init
common = common_tests()

for family in FAMILIES:
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]]
    members = {
        "all_model_classes": (model_class,),
        "setUp": lambda self, family=family: setattr(self, "model_tester", SmallModel(family)),
        "__module__": __name__,
    }
    bases = (common.ModelTesterMixin, common.GenerationTesterMixin, unittest.TestCase)
    name = f"Test_{family}"
    globals()[name] = type(name, bases, members)
