"""Saving is all or nothing; loading says what is wrong."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from models import tiny_model, tokens
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, PreTrainedModel

from slicegpt_fast import InputError, load_model, load_tokenizer, save_model, slice_model
from slicegpt_fast.checkpoint import check_writable, write_folder


@pytest.mark.parametrize("sliced", [False, True])
@torch.no_grad()
def test_round_trip(sliced, tmp_path):
    model = tiny_model(tied=True)
    if sliced:
        model = slice_model(model, [tokens(4, 32)], sparsity=0.25, progress=False)
    save_model(model, tmp_path / "new" / "model")
    loaded = load_model(tmp_path / "new" / "model")
    assert not loaded.training
    assert torch.equal(loaded(tokens(1, 9)).logits, model(tokens(1, 9)).logits)
    assert load_model(tmp_path / "new" / "model", dtype=torch.bfloat16).dtype == torch.bfloat16
    assert os.listdir(tmp_path / "new") == ["model"]


def test_an_empty_folder_is_filled_and_a_full_one_refused(tmp_path):
    save_model(tiny_model(), tmp_path / "out")
    with pytest.raises(
        InputError, match=r"out exists and is not an empty folder: choose another place \(--out\) or remove it"
    ):
        save_model(tiny_model(), tmp_path / "out")
    (tmp_path / "empty").mkdir()
    save_model(tiny_model(), tmp_path / "empty")
    load_model(tmp_path / "empty")


def test_a_folder_that_cannot_be_made_is_refused_before_long_work(tmp_path):
    (tmp_path / "file").touch()
    for folder in ("/proc/model", tmp_path / "file" / "model", tmp_path / ("model" * 100)):
        with pytest.raises(InputError, match=rf"{folder} cannot be made \(.*\): choose another place \(--out\)\.$"):
            check_writable(folder)
    check_writable(tmp_path / "new" / "model")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), PermissionError("denied"), KeyboardInterrupt()]
)
def test_a_failing_save_leaves_nothing(error, tmp_path, monkeypatch):
    def fail(self, folder, **_):
        (folder / "config.json").write_text("{}")
        raise error

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else InputError
    with pytest.raises(expected, match=None if expected is KeyboardInterrupt else "cannot write .*out: "):
        save_model(tiny_model(), tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_disk_too_small_is_refused_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(InputError, match=r"out needs up to 0\.00 GB, but only 0\.00 GB are free"):
        save_model(tiny_model(), tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_killed_save_leaves_no_folder_that_loads(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from slicegpt_fast.checkpoint import write_folder\n"
        "def write(folder):\n"
        "    (folder / 'config.json').write_text('{}'); print('writing', flush=True); time.sleep(60)\n"
        "write_folder(Path(sys.argv[1]), write)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, tmp_path / "out"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    save_model(tiny_model(), tmp_path / "out")  # and is no obstacle to the next try
    load_model(tmp_path / "out")


def test_size_is_checked_where_the_folder_will_be(tmp_path):
    with pytest.raises(InputError, match=r"needs up to 1000000000\.00 GB"):
        write_folder(tmp_path / "a" / "b", lambda _: None, size=10**18)


@pytest.mark.parametrize(
    "source", ["/no/such/folder", "./missing", "~/missing-model", "a/b/c", "missing.gguf", "folder/missing.gguf"]
)
@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_missing_sources(load, source):
    with pytest.raises(InputError, match=f"{source} does not exist: give a hub id, a local folder or a GGUF file"):
        load(source)


def test_an_unknown_hub_id_offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="cannot load nobody/nothing: "):
        load_model("nobody/nothing")


class TestDamage:
    @pytest.fixture
    def folder(self, tmp_path):
        save_model(tiny_model(), tmp_path / "model")
        return tmp_path / "model"

    def test_empty_folder(self, tmp_path):
        with pytest.raises(InputError, match="cannot load"):
            load_model(tmp_path)

    def test_truncated_weights(self, folder):
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-10])
        with pytest.raises(InputError, match="cannot load"):
            load_model(folder)

    def test_missing_tensor(self, folder):
        weights = load_file(folder / "model.safetensors")
        del weights["model.layers.0.mlp.up_proj.weight"]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match=r"lacks 1 tensors \(model\.layers\.0\.mlp\.up_proj\.weight"):
            load_model(folder)

    def test_wrong_shape(self, folder):
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"] = torch.ones(7)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match="cannot load"):
            load_model(folder)

    def test_pickled_weights_are_not_read(self, folder):
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        with pytest.raises(InputError, match="safetensors"):
            load_model(folder)

    def test_broken_config(self, folder):
        (folder / "config.json").write_text("{")
        with pytest.raises(InputError, match="cannot load"):
            load_model(folder)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"hidden_size": "64"}, r"Field 'hidden_size' expected int, got str \(value: '64'\)\.$"),
            ({"num_attention_heads": 5}, r"The hidden size \(48\) is not a multiple of .* attention heads \(5\)\.$"),
        ],
    )
    def test_a_config_that_cannot_be_followed(self, folder, change, message):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        with pytest.raises(InputError, match=f"^cannot load {folder}: {message}"):
            load_model(folder)

    @pytest.mark.parametrize(
        ("error", "message"),
        [(ImportError("it needs optimum.\nOr another."), "it needs optimum"), (RuntimeError(), "RuntimeError")],
    )
    def test_a_missing_package_and_an_error_without_a_message(self, folder, error, message, monkeypatch):
        def fail(*_, **__):
            raise error

        monkeypatch.setattr("slicegpt_fast.checkpoint.AutoModelForCausalLM.from_pretrained", fail)
        with pytest.raises(InputError, match=f"^cannot load {folder}: {message}\\.$"):
            load_model(folder)

    def test_not_a_language_model(self, tmp_path):
        config = BertConfig(
            vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
        )
        BertModel(config).save_pretrained(tmp_path / "bert")
        with pytest.raises(InputError, match="lacks"):
            load_model(tmp_path / "bert")

    def test_no_tokenizer(self, folder):
        with pytest.raises(InputError, match="cannot load"):
            load_tokenizer(folder)


@pytest.mark.parametrize("word", ["old", "", "-1", "1.5", "²", "9" * 30, str(os.getppid())])
def test_neighbours_of_others_are_left_alone(tmp_path, word):
    neighbour = tmp_path / f".out.partial-{word}"
    neighbour.mkdir()
    save_model(tiny_model(), tmp_path / "out")
    assert neighbour.is_dir()
    assert (tmp_path / "out" / "config.json").exists()


def test_what_an_earlier_process_of_the_same_id_left_is_removed(tmp_path):
    """In a container every run may have the same id."""
    (tmp_path / f".out.partial-{os.getpid()}").mkdir()
    write_folder(tmp_path / "out", lambda folder: (folder / "file").touch())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    killed = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    left, others = tmp_path / f".out.partial-{killed.stdout.strip()}", tmp_path / f".out.partial-{os.getppid()}"
    for folder in (left, others):
        folder.mkdir()
        (folder / "model.safetensors").touch()
    write_folder(tmp_path / "out", lambda folder: (folder / "file").touch())
    assert {path.name for path in tmp_path.iterdir()} == {"out", others.name}
