"""Each script of examples/ runs, as a user runs it, on a small model."""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from models import tiny_model
from texts import TEXT, word_tokenizer

from slicegpt_fast import load_model, load_tokenizer, perplexity, save_model, slice_model, token_batches
from slicegpt_fast.slicing import slice_config_of

EXAMPLES = Path(__file__).parents[1] / "examples"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::SyntaxWarning"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "corpus.txt"
    file.write_text(" ".join([TEXT] * 20))
    return file


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "dense"
    save_model(tiny_model(), folder, word_tokenizer())
    return folder


@pytest.fixture(scope="module")
def sliced(dense, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "sliced"
    batches = token_batches(load_tokenizer(dense), text.read_text(), length=16, sequences=None)
    save_model(slice_model(load_model(dense), batches, sparsity=0.25, progress=False), folder, load_tokenizer(dense))
    return folder


def command(script, *arguments):
    return [sys.executable, str(EXAMPLES / script), *map(str, arguments)]


def ran(script, *arguments) -> str:
    """Standard output of a script that succeeds."""
    result = subprocess.run(command(script, *arguments), env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_script_has_a_test():
    scripts = {file.name for file in EXAMPLES.glob("*.py")}
    assert scripts == {"slice.py", "patch.py", "serve.py", "fine_tune.py"}


def test_slice(dense, text, tmp_path):
    out = tmp_path / "sliced"
    output = ran("slice.py", dense, text, text, out, "--target-params", 0.7, "--sequences", 10, "--length", 16)
    model = load_model(out)
    assert slice_config_of(model).plan().channels
    held_out = token_batches(load_tokenizer(out), text.read_text(), length=16, sequences=None)
    for name, each in {"dense": load_model(dense), "sliced": model}.items():
        assert f"{name}: {each.num_parameters():,} parameters, perplexity {perplexity(each, held_out):.2f}" in output


def test_patch(sliced):
    output = ran("patch.py", sliced, "the cat sat")
    assert "as it is: " in output
    assert "patched: " in output
    assert "model.layers.2.feedforward" in output
    assert "norm_linear + residual_linear" in output


def test_serve(sliced):
    server = subprocess.Popen(
        command("serve.py", sliced, "--port", 0, "--new-tokens", 6), env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    try:
        address = server.stdout.readline().removeprefix("serving on ").strip()
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(address, data=b"the cat sat", timeout=60) as answer:
            served = answer.read().decode()
    finally:
        server.terminate()
        server.wait()
    model, tokenizer = load_model(sliced), load_tokenizer(sliced)
    tokens = model.generate(**tokenizer("the cat sat", return_tensors="pt"), max_new_tokens=6, do_sample=False)[0]
    assert served == tokenizer.decode(tokens, skip_special_tokens=True)


def test_fine_tune(sliced, text, tmp_path):
    out = tmp_path / "recovered"
    options = ["--steps", 30, "--length", 16, "--learning-rate", 0.02]
    losses = [float(line.split()[-1]) for line in ran("fine_tune.py", sliced, text, out, *options).splitlines()]
    assert losses[-1] < losses[0]
    before, after = load_model(sliced), load_model(out)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "slicegpt"
    assert {name: tensor.shape for name, tensor in after.state_dict().items()} == {
        name: tensor.shape for name, tensor in before.state_dict().items()
    }
    batches = token_batches(word_tokenizer(), text.read_text(), length=16, sequences=None)
    assert perplexity(after, batches) < perplexity(before, batches)
