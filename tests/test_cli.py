"""The command line: what it prints, what it writes, and how it fails."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from models import tiny_model
from texts import TEXT, word_tokenizer
from typer.testing import CliRunner

from slicegpt_fast import InputError, load_model, load_tokenizer, perplexity, save_model, slice_model
from slicegpt_fast.calibration import batched, join_documents, token_windows
from slicegpt_fast.cli import app
from slicegpt_fast.evaluation import stored_parameters
from slicegpt_fast.kernels import measured
from slicegpt_fast.ops import tuning
from slicegpt_fast.ops.backends import smoke
from slicegpt_fast.ops.backends.smoke import CASES, Outcome
from slicegpt_fast.patching import op_requests
from slicegpt_fast.slicing import SliceOptions, cut_to_budget, slice_config_of
from slicegpt_fast.slicing.summary import kept_sizes
from slicegpt_fast.tables import plan_title
from slicegpt_fast.tasks import Score

LENGTH = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tiny dense model and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    save_model(tiny_model(), folder, word_tokenizer())
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder of three files of 60 tokens, each with its words in another order."""
    folder = tmp_path_factory.mktemp("texts")
    words = TEXT.split()
    for number in range(3):
        turned = words[7 * number :] + words[: 7 * number]
        (folder / f"{number}.txt").write_text(" ".join((turned * 3)[:60]))
    return folder


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ran(*arguments) -> str:
    """Standard output of a command that succeeds."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def error_of(*arguments) -> str:
    """What a command that is given bad input says about it: one line, exit code 2."""
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.stderr.splitlines()[-1:] == lines
    return lines[0].removeprefix("error: ")


def raises(error):
    def fail(*_, **__):
        raise error

    return fail


def windows_of(model, texts, seed=None):
    documents = [file.read_text() for file in sorted(texts.iterdir())]
    return token_windows(load_tokenizer(model), join_documents(documents, seed), LENGTH)


@pytest.mark.parametrize(
    "command", ["quickstart", "slice", "quantize", "recover", "eval", "generate", "bench", "export", "info"]
)
def test_help_comes_with_examples(command):
    assert command in ran("--help")
    for flag in ("--help", "-h"):
        assert "Examples" in ran(command, flag)
        assert f"slicegpt-fast {command}" in ran(command, flag)


class TestSlice:
    @pytest.fixture
    def common(self, model, texts, tmp_path):
        return ["slice", model, "--text", texts, "--out", tmp_path / "out", "--length", LENGTH]

    @pytest.fixture
    def little_memory(self, monkeypatch):
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100_000))
        return monkeypatch

    @pytest.mark.parametrize(
        ("options", "arguments"),
        [
            (["--sparsity", "0.25"], dict(sparsity=0.25)),
            (
                ["--target-params", "0.8", "--basis", "shared", "--signal", "normalized", "--round-to", "4"],
                dict(target_params=0.8, basis="shared", signal="normalized", round_to=4),
            ),
            (
                ["--sparsity", "0.4", "--basis", "2", "--shortcut", "aligned", "--slice-head", "--refit"],
                dict(sparsity=0.4, basis=2, shortcut="aligned", slice_head=True, refit=True),
            ),
        ],
    )
    @torch.no_grad()
    def test_writes_what_the_library_makes(self, common, model, texts, tmp_path, options, arguments):
        output = ran(*common, "--sequences", 5, "--seed", 3, *options)
        windows = windows_of(model, texts, seed=3)
        assert not torch.equal(windows, windows_of(model, texts))  # the seed shuffles the files
        expected = slice_model(load_model(model), batched(windows[:5]), progress=False, **arguments)
        sliced = load_model(tmp_path / "out")
        assert torch.equal(sliced(windows[5:6]).logits, expected(windows[5:6]).logits)
        assert load_tokenizer(tmp_path / "out")("the cat")["input_ids"] == word_tokenizer()("the cat")["input_ids"]
        assert (tmp_path / "out" / "spectra.png").stat().st_size > 10_000

        for each in (load_model(model), sliced):
            assert f"{stored_parameters(each) / 1000:.1f} k" in output
            assert f"{perplexity(each, batched(windows[5:])):.2f}" in output
        assert f"Perplexity: the next {len(windows) - 5} sequences of 16 tokens of the text." in output
        assert f"Saved to {tmp_path / 'out'}, with its spectra in" in output

    @pytest.mark.parametrize(
        ("options", "arguments"),
        [
            ([], {}),
            (["--cut", "auto", "--budget", "bytes", "--round-to", "8"], dict(budget="bytes", round_to=8)),
            (["--cut", "values,channels", "--uniform"], dict(cut=("values", "channels"), uniform=True)),
            (["--cut", "stream", "--round-to", "8"], dict(cut=("stream",), round_to=8)),
        ],
    )
    @torch.no_grad()
    def test_cuts_as_the_library_does(self, common, model, texts, tmp_path, options, arguments):
        output = ran(*common, "--sequences", 8, "--target-params", 0.8, *options)
        windows = windows_of(model, texts, seed=0)
        dense = load_model(model)
        options = SliceOptions(target_params=0.8, **arguments)
        expected = cut_to_budget(dense, batched(windows[:8]), options, progress=False)
        sliced = load_model(tmp_path / "out")
        assert torch.equal(sliced(windows[8:]).logits, expected.model(windows[8:]).logits)

        assert plan_title(str(model), dense, expected.plan) in output
        assert "Plans within the budget, the first one taken" in output
        for trial in expected.trials:
            assert f"{trial.sizes.stored:.3f} │" in output
        card = (tmp_path / "out" / "README.md").read_text()
        values = [f"{perplexity(each, batched(windows[8:])):.2f}" for each in (dense, sliced)]
        assert f"| perplexity | {' | '.join(values)} |" in card
        if expected.plan.cuts_layers:
            assert f"* Kept: {kept_sizes(dense, expected.plan)}." in card
        trials = json.loads((tmp_path / "out" / "plan.json").read_text())
        assert [trial["sizes"]["loss"] for trial in trials] == [trial.sizes.loss for trial in expected.trials]
        assert [trial["added"] for trial in trials] == [trial.added for trial in expected.trials]
        assert trials[0]["sizes"]["channels"] == [*expected.plan.channels]
        drawn = {file.name for file in (tmp_path / "out").glob("*.png")}
        assert drawn == ({"spectra.png"} if arguments.get("cut") == ("stream",) else {"sizes.png"})
        for name in (*drawn, "plan.json"):
            assert f"{Path(name).stem} in {tmp_path / 'out' / name}" in output

    @pytest.mark.parametrize("automatic", [True, False])
    def test_cuts_are_not_streamed(self, common, tmp_path, little_memory, automatic):
        if not automatic:
            little_memory.undo()
        message = error_of(*common, "--target-params", 0.8, *([] if automatic else ["--stream"]))
        assert message == (
            "--target-params without --basis cuts by gradients, which slicing from file to file does not compute: "
            "choose a plan with --basis, or give --no-stream."
        )
        assert list(tmp_path.iterdir()) == []

    def test_without_text_left_over(self, common):
        assert "Perplexity: not measured, calibration took all of the text." in ran(
            *common, "--sequences", 11, "--sparsity", 0.5
        )

    def test_basis_auto(self, common, tmp_path):
        output = ran(*common, "--sequences", 8, "--target-params", 0.8, "--basis", "auto", "--round-to", 5)
        best = next(line for line in output.splitlines() if line.startswith("│") and "perplexity" not in line)
        width = load_model(tmp_path / "out").get_input_embeddings().embedding_dim
        assert best.split("│")[2].strip() == str(width)
        assert width % 5 == 0
        assert {"spectra.png", "plans.png", "model.safetensors"} <= {file.name for file in (tmp_path / "out").iterdir()}

    def test_streams_what_does_not_fit_into_memory(self, common, model, texts, tmp_path, little_memory):
        result = run(*common, "--sequences", 5, "--sparsity", 0.25)
        assert result.exit_code == 0, result.output
        assert "Slicing from file to file: model, copy and text do not fit into memory. --no-stream" in result.stderr
        assert "sliced" in result.stdout
        calibration = batched(windows_of(model, texts, seed=0)[:5])
        expected = slice_model(load_model(model), calibration, sparsity=0.25, progress=False).state_dict()
        sliced = load_model(tmp_path / "out").state_dict()
        assert sliced.keys() == expected.keys()
        assert all(torch.equal(sliced[name], expected[name]) for name in expected)
        assert (tmp_path / "out" / "spectra.png").exists()

    @pytest.mark.parametrize(("options", "times"), [(["--basis", "2"], 1), (["--refit"], 2), (["--basis", "auto"], 2)])
    def test_counts_the_activations_of_the_text(self, common, options, times, monkeypatch):
        def fits(*_, tokens, **__):
            raise InputError(f"{tokens} tokens.")

        monkeypatch.setattr("slicegpt_fast.streaming.fits_in_memory", fits)
        expected = f"{times * 5 * LENGTH} tokens."
        assert error_of(*common, "--sequences", 5, "--target-params", 0.8, *options) == expected

    def test_streams_or_not_when_told(self, common, tmp_path, little_memory):
        assert "Perplexity: " in ran(*common, "--sequences", 5, "--sparsity", 0.25, "--no-stream")
        (tmp_path / "out").rename(tmp_path / "in-memory")
        little_memory.undo()
        assert "Perplexity: " not in ran(*common, "--sequences", 5, "--sparsity", 0.25, "--stream")

    def test_goes_on_with_an_unfinished_run(self, common, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr("slicegpt_fast.unfinished.save_file", raises(OSError("No space left on device")))
            error_of(*common, "--sequences", 5, "--sparsity", 0.25, "--stream")
        result = run(*common, "--sequences", 5, "--sparsity", 0.25)
        assert "Slicing from file to file: an earlier run is unfinished." in result.stderr
        assert [file.name for file in tmp_path.iterdir()] == ["out"]

    def test_basis_auto_is_not_streamed(self, common, little_memory):
        message = error_of(*common, "--target-params", 0.8, "--basis", "auto")
        assert message == "--basis auto compares whole models in memory: choose a basis, or give --no-stream."

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ([], "give exactly one of --sparsity and --target-params."),
            (["--sparsity", "0.2", "--target-params", "0.9"], "give exactly one of --sparsity and --target-params."),
            (["--sparsity", "0.2", "--basis", "auto"], "--basis auto compares plans of one size: give it as --target"),
            *(
                (
                    ["--target-params", "0.8", "--basis", "auto", *option],
                    f"--basis auto chooses {option[0]} itself: leave",
                )
                for option in (
                    ["--signal", "normalized"],
                    ["--signal", "raw"],  # the default, but asked for
                    ["--shortcut", "aligned"],
                    ["--shortcut-rank", "3"],
                    ["--schedule", "variance"],
                    ["--refit"],
                    ["--slice-head"],
                    ["--cut", "auto"],
                    ["--budget", "bytes"],
                    ["--uniform"],
                )
            ),
            (
                ["--target-params", "0.8", "--basis", "auto", "--sequences", "1"],
                "--basis auto holds some sequences out to compare plans: give --sequences 2 or more.",
            ),
            (["--sparsity", "0.2", "--cut", "auto"], "cut spends a budget: give target_params."),
            (
                ["--target-params", "0.8", "--cut", "heads"],
                "cut must be 'auto' or some of 'stream', 'channels', 'values'",
            ),
            (
                ["--target-params", "0.8", "--cut", "values", "--basis", "2"],
                "cut chooses basis itself: leave one of the",
            ),
            (["--target-params", "0.8", "--basis", "shared", "--uniform"], "budget and uniform belong to cut: "),
            (["--sparsity", "1.5"], "sparsity must be at least 0 and below 1, not 1.5."),
            (["--sparsity", "0.2", "--basis", "best"], "basis must be "),
            (["--sparsity", "0.2", "--round-to", "few"], "round_to must be "),
            (["--sparsity", "0.2", "--split", "train"], "--split belongs to --dataset: leave it out with --text."),
            (["--sparsity", "0.2", "--dataset", "c4"], "give either --text or --dataset."),
            (["--sparsity", "0.2", "--text", "missing"], "text missing does not exist: give text files or folders"),
            (
                ["--sparsity", "0.2", "--length", "200"],
                "--length 200 is more than the model's 128 positions: lower it.",
            ),
            (
                ["--sparsity", "0.2", "--sequences", "12"],
                "the text has 180 tokens, but 192 are needed (12 windows of 16): give more text, or ask for fewer or ",
            ),
            (
                ["--sparsity", "0.2", "--sequences", "2"],
                "calibration has 32 tokens, but a basis of 48 directions needs",
            ),
            (["--sparsity", "0.2", "--device", "toaster"], "--device toaster cannot be used: "),
        ],
    )
    def test_bad_input(self, common, tmp_path, options, message):
        assert error_of(*common, "--sequences", 5, *options).startswith(message)
        assert list(tmp_path.iterdir()) == []

    def test_an_occupied_folder_is_refused_before_anything_is_done(self, common, tmp_path, monkeypatch):
        monkeypatch.setattr("slicegpt_fast.checkpoint.load_model", None)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").touch()
        assert error_of(*common, "--sparsity", "0.2").endswith(
            "out exists and is not an empty folder: choose another place (--out) or remove it."
        )

    def test_ctrl_c_within_native_code(self, common, tmp_path, monkeypatch):
        def interrupted(*_, **__):
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
            except KeyboardInterrupt:
                raise ValueError("could not determine the shape") from None

        monkeypatch.setattr("slicegpt_fast.workflow.apply_bases", interrupted)
        result = run(*common, "--sequences", 5, "--sparsity", "0.2")
        assert (result.exit_code, result.stderr.splitlines()[-1]) == (130, "interrupted")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_ctrl_c(self, common, tmp_path, monkeypatch):
        monkeypatch.setattr("slicegpt_fast.workflow.apply_bases", raises(KeyboardInterrupt))
        result = run(*common, "--sequences", 5, "--sparsity", "0.2")
        assert (result.exit_code, result.stdout) == (130, "")
        assert result.stderr.splitlines()[-1] == "interrupted"
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "option", [["--signal", "loud"], ["--sequences", "0"], ["--length", "1"], ["--sparsity", "x"]]
    )
    def test_options_out_of_range(self, common, option):
        result = run(*common, *option)
        assert result.exit_code == 2
        assert f"Invalid value for '{option[0]}'" in result.stderr


class TestQuantize:
    @pytest.mark.parametrize("options", [("--bits", 8), ("--bits", 4), ("--bits", 4, "--group", 64)])
    def test_with_and_without_text(self, options, model, texts, tmp_path):
        printed = ran("quantize", model, *options, "--out", tmp_path / "nearest")
        assert "rounded by nearest" in printed
        assert "not measured" in printed
        sizes = ("--length", LENGTH, "--sequences", 4)
        printed = ran("quantize", model, *options, "--text", texts, *sizes, "--out", tmp_path / "gptq")
        assert "rounded by gptq" in printed
        assert f"{options[1]} bits" in ran("info", tmp_path / "gptq")
        assert load_model(tmp_path / "gptq").get_memory_footprint() < load_model(model).get_memory_footprint() / 2

    def test_slicing_in_one_go(self, model, texts, tmp_path):
        sizes = ("--text", texts, "--length", LENGTH, "--sequences", 4)
        printed = ran("slice", model, "--target-params", 0.8, "--bits", 8, *sizes, "--out", tmp_path / "both")
        assert "8 bits" in printed
        assert slice_config_of(load_model(tmp_path / "both")).plan().cuts_layers

    def test_wrong_bits(self, model, tmp_path):
        result = run("quantize", model, "--bits", 3, "--out", tmp_path / "out")
        assert result.exit_code == 2
        assert "error: bits must be 8 or 4, not 3." in result.stderr
        assert not (tmp_path / "out").exists()


class TestRecover:
    @pytest.fixture
    def common(self, model, texts, tmp_path):
        sizes = ("--text", texts, "--length", LENGTH, "--sequences", 8)
        ran("slice", model, *sizes, "--target-params", 0.8, "--out", tmp_path / "sliced")
        common = ["recover", tmp_path / "sliced", "--teacher", model, "--text", texts, "--length", LENGTH]
        return [*common, "--out", tmp_path / "better"]

    @pytest.mark.parametrize("train", ["all", "lora"])
    def test_trains_and_saves(self, common, train, tmp_path):
        printed = ran(*common, "--sequences", 8, "--train", train, "--steps", 2, "--rank", 2)
        assert "won back" in printed
        assert "of 2 steps" in printed
        files = {path.name for path in (tmp_path / "better").iterdir()}
        assert {"model.safetensors", "config.json", "tokenizer.json", "recovery.png", "README.md"} <= files
        assert sorted(path.name for path in tmp_path.iterdir()) == ["better", "sliced"]
        before, after = (load_model(tmp_path / name) for name in ("sliced", "better"))
        assert before.state_dict().keys() == after.state_dict().keys()
        assert slice_config_of(before) == slice_config_of(after)

    def test_bad_input(self, common, model, tmp_path):
        assert "none is held out: lower it" in error_of(*common, "--sequences", 11)
        assert "does not exist" in error_of(*common[:3], "./nowhere", *common[4:], "--sequences", 8)
        assert not (tmp_path / "better").exists()
        assert not (tmp_path / ".better.unfinished").exists()


class TestEval:
    @pytest.mark.parametrize("sequences", [3, None])
    def test_text(self, model, texts, sequences):
        expected = windows_of(model, texts)[:sequences]
        options = [] if sequences is None else ["--sequences", sequences]
        output = ran(
            "eval",
            model,
            "--text",
            texts / "0.txt",
            "--text",
            texts / "1.txt",
            "--text",
            texts / "2.txt",
            "--length",
            LENGTH,
            *options,
        )
        value = perplexity(load_model(model), batched(expected))
        assert output == f"perplexity {value:.4f} ({len(expected)} sequences of 16 tokens, torch.float32)\n"

    def test_dataset_and_dtype(self, model, texts, monkeypatch):
        def documents(name, purpose, split):
            assert (name, purpose, split) == ("ptb", "evaluation", "validation")
            return [TEXT]

        monkeypatch.setattr("slicegpt_fast.calibration.dataset_documents", documents)
        output = ran("eval", model, "--dataset", "ptb", "--split", "validation", "--length", 8, "--dtype", "bfloat16")
        assert output.endswith("(3 sequences of 8 tokens, torch.bfloat16)\n")

    def test_rows(self, model, texts, tmp_path):
        rows = [{"n": str(number), "body": file.read_text()} for number, file in enumerate(sorted(texts.iterdir()))]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        value = perplexity(load_model(model), batched(windows_of(model, texts)))
        options = ["--text", tmp_path / "rows.jsonl", "--length", LENGTH]
        assert ran("eval", model, *options, "--text-field", "body").startswith(f"perplexity {value:.4f} ")
        assert "(it has n, body): name the one to read (--text-field" in error_of("eval", model, *options)
        message = "--text-field belongs to --text: leave it out with --dataset."
        assert error_of("eval", model, "--dataset", "ptb", "--text-field", "body") == message

    def test_tasks(self, model, monkeypatch, tmp_path):
        """Dense beside sliced, with what is recovered; the scores are a stand-in's."""
        sliced = slice_model(load_model(model), [torch.arange(64).view(2, 32)], sparsity=0.25, progress=False)
        save_model(sliced, tmp_path / "sliced", word_tokenizer())
        asked = []

        class Tasks:
            def __init__(self, names, **options):
                asked.append((names, options))

            def scores(self, loaded, tokenizer, **options):
                value = 0.5 if slice_config_of(loaded) is None else 0.4
                asked.append((str(loaded.dtype), options))
                return [Score("piqa", "acc", value, 0.01, True), Score("wiki", "perplexity", 10 / value, None, False)]

        monkeypatch.setattr("slicegpt_fast.tasks.Tasks", Tasks)
        options = ["--tasks", "piqa,wiki", "--task-folder", tmp_path, "--limit", 7, "--batch", 3]
        output = ran("eval", tmp_path / "sliced", "--dense", model, *options, "--dtype", "bfloat16")
        named = (["piqa", "wiki"], dict(folder=tmp_path, limit=7))
        assert asked == [named, *[("torch.bfloat16", dict(batch_size=3))] * 2]
        cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if "│" in line]
        assert cells == [
            ["piqa", "acc", "0.5000 ± 0.0100", "0.4000 ± 0.0100", "80.0%"],
            ["wiki", "perplexity", "20.0000", "25.0000", "80.0%"],
        ]
        assert "recovery" in output
        output = ran("eval", model, "--tasks", "piqa")
        assert "0.5000 ± 0.0100" in output
        assert "recovery" not in output

    def test_tasks_or_text(self, model, texts):
        message = "give --tasks, or --text or --dataset: one of the three."
        assert error_of("eval", model, "--tasks", "piqa", "--text", texts) == message
        message = "--dense, --task-folder and --limit belong to --tasks: leave them out, or name tasks."
        for option in (["--dense", model], ["--task-folder", texts], ["--limit", 3]):
            assert error_of("eval", model, "--text", texts, *option) == message

    def test_no_text(self, model):
        assert error_of("eval", model) == "give either --text or --dataset."

    def test_no_model(self, tmp_path, texts):
        message = error_of("eval", tmp_path / "gone", "--text", texts)
        assert message == f"{tmp_path / 'gone'} does not exist: give a hub id, a local folder or a GGUF file."


class TestExport:
    def test_plain(self, model, tmp_path):
        windows = [torch.arange(64).view(2, 32)]
        sliced = slice_model(load_model(model), windows, sparsity=0.27, round_to=1, basis="shared", progress=False)
        save_model(sliced, tmp_path / "sliced", word_tokenizer())
        output = ran("export", tmp_path / "sliced", "--out", tmp_path / "plain")
        size = "llama, hidden size 36, 1 of it zeros that llama's config asks for"
        assert output == f"Saved to {tmp_path / 'plain'}: {size}.\n"
        assert load_model(tmp_path / "plain").config.hidden_size == 36

    @pytest.mark.parametrize("runtime", ["onnx", "openvino"])
    def test_graph(self, model, tmp_path, monkeypatch, runtime):
        asked = []

        def export_graph(loaded, out, tokenizer, *, runtime):
            asked.append((type(loaded).__name__, out, tokenizer("the cat").input_ids, runtime))

        monkeypatch.setattr("slicegpt_fast.export.export_graph", export_graph)
        output = ran("export", model, "--to", runtime, "--out", tmp_path / "graph")
        assert output == f"Saved to {tmp_path / 'graph'}: a graph of llama for {runtime}, in fp32.\n"
        assert asked == [("LlamaForCausalLM", tmp_path / "graph", word_tokenizer()("the cat").input_ids, runtime)]

    def test_what_is_missing_is_said_before_the_model_is_loaded(self, tmp_path, monkeypatch):
        monkeypatch.setattr("slicegpt_fast.errors.find_spec", lambda name: None)
        message = error_of("export", tmp_path / "no model", "--to", "onnx", "--out", tmp_path / "graph")
        assert message == "the package onnx is not installed: pip install 'slicegpt-fast[onnx]' brings it."


class TestGenerate:
    def test_continues_greedily(self, model):
        output = ran("generate", model, "--prompt", "the cat sat", "--max-new-tokens", 6)
        tokenizer = word_tokenizer()
        prompt = tokenizer("the cat sat", return_tensors="pt")
        tokens = load_model(model).generate(**prompt, max_new_tokens=6, do_sample=False)[0]
        assert output.split() == tokenizer.decode(tokens, skip_special_tokens=True).split()
        assert output.startswith("the cat sat")

    def test_nothing_to_continue(self, model, tmp_path):
        save_model(tiny_model(), tmp_path / "model", word_tokenizer())
        file = tmp_path / "model" / "tokenizer.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": None}))
        assert (
            error_of("generate", tmp_path / "model", "--prompt", "") == "--prompt is empty: give some text to continue."
        )


@pytest.fixture(scope="module")
def sliced(model, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "sliced"
    windows = batched(windows_of(model, texts))
    save_model(slice_model(load_model(model), windows, sparsity=0.25, progress=False), folder)
    return folder


class TestBench:
    @pytest.fixture
    def quick(self, monkeypatch):
        monkeypatch.setattr("slicegpt_fast.benchmark.PROBES", {"cpu": (1 << 16, 64)})
        return ["--harness", "eager", "--prompt", 8, "--new", 2]

    def test_dense_sliced_and_patched(self, model, sliced, quick, tmp_path):
        out = tmp_path / "speed"
        output = ran("bench", sliced, "--dense", model, "--batch", 2, "--dtype", "bfloat16", "--out", out, *quick)
        result = json.loads((out / "bench.json").read_text())
        assert [row["model"] for row in result["rows"]] == ["dense", "sliced", "patched"]
        assert result["model"] == str(sliced)
        assert result["settings"] == dict(batch=2, prompt=8, new_tokens=2, rounds=5, dtype="bfloat16")
        for row in result["rows"]:
            assert f"{row['prefill']:.1f}" in output
            assert f"{row['decode']:.1f}" in output
        assert {file.name for file in out.iterdir()} == {"bench.json", "bench.png"}

    def test_a_dense_model_alone(self, model, quick):
        output = ran("bench", model, *quick)
        assert [word in output for word in ("dense", "sliced", "patched")] == [True, False, True]

    def test_bad_input(self, model, tmp_path, quick):
        (tmp_path / "taken").touch()
        assert error_of("bench", model, "--out", tmp_path).endswith("choose another place (--out) or remove it.")
        assert error_of("bench", model, "--harness", "fast").startswith("harness is 'fast'; it must be one of eager,")
        assert "are more than the model's 128 positions" in error_of("bench", model, "--prompt", 200)
        assert error_of("bench", tmp_path / "gone").startswith(f"{tmp_path / 'gone'} does not exist")

    def test_ctrl_c(self, model, quick, tmp_path, monkeypatch):
        def interrupt(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("slicegpt_fast.plots.plot_speeds", interrupt)
        assert run("bench", model, "--out", tmp_path / "speed", *quick).exit_code == 130
        assert list(tmp_path.iterdir()) == []


class TestInfo:
    def test_installation(self):
        output = ran("info")
        for fact in (torch.__version__, sys.version.split()[0], "CPU kernels", "CUDA kernels", "built with"):
            assert fact in output

    def test_model(self, model):
        assert "no, but it can be" in ran("info", model)

    def test_no_model(self, tmp_path):
        assert error_of("info", tmp_path).startswith(f"cannot load {tmp_path}: ")


class TestTune:
    @pytest.mark.parametrize("shortcut", ["dense", "aligned"])
    def test_measures_what_a_patched_model_asks_for(self, shortcut, tmp_path, monkeypatch):
        """With a clock that stands still, and Triton's interpreter in the place of a GPU: it has no bf16."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(tuning, "current_gpu", lambda: torch.device("cpu"))
        monkeypatch.setattr(tuning, "microseconds", lambda call: 1.0)
        windows = [torch.randint(64, (4, LENGTH))]
        sliced = slice_model(tiny_model(), windows, sparsity=0.25, shortcut=shortcut, progress=False)
        save_model(sliced, tmp_path / "sliced")
        measured._tables.cache_clear()
        try:
            output = ran("tune", tmp_path / "sliced", "--rows", 1, "--rows", 512, "--dtype", "float16")
            for request in (request for pair in op_requests(sliced) for request in pair if request is not None):
                bucket = measured.bucket(torch.float16, request.shape, request.epilogue)
                assert measured.lookup("cpu", request.op, bucket).us["reference"] == 1.0
                assert request.op in output
        finally:
            measured._tables.cache_clear()

    def test_without_a_gpu(self, model):
        if not torch.cuda.is_available():
            for arguments in ([model], ["--quick"]):
                assert "there is no CUDA device to tune for" in error_of("tune", *arguments)

    @pytest.mark.parametrize("right", [True, False])
    def test_quick(self, right, monkeypatch):
        outcome = Outcome("cuda", CASES[0], "ok" if right else "killed after 20 s", 0.0)
        monkeypatch.setattr(smoke, "quick", lambda: iter([outcome]))
        result = run("tune", "--quick")
        assert result.exit_code == (0 if right else 1)
        assert result.stdout.endswith(f"{int(right)} of 1 cases are right.\n")
        assert ("cuda norm_linear" in result.stdout) == (not right)

    @pytest.mark.parametrize("arguments", [[], ["model", "--quick"]])
    def test_a_model_or_a_quick_check(self, arguments):
        assert error_of("tune", *arguments) == "tune needs a MODEL to time, or --quick alone: give one of the two."


def test_the_installed_script(model, texts, tmp_path):
    """A process of its own: results on stdout, one line on stderr when the input is bad, no traceback."""
    script = Path(sys.executable).with_name("slicegpt-fast")
    command = [script, "eval", model, "--length", str(LENGTH), "--text"]
    good = subprocess.run([*command, texts], capture_output=True, text=True, check=True)
    assert good.stdout.startswith("perplexity ")
    bad = subprocess.run([*command, tmp_path / "gone"], capture_output=True, text=True)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == f"error: text {tmp_path / 'gone'} does not exist: give text files or folders of text files.\n"


@pytest.mark.parametrize("arguments", [["--help"], ["slice", "--help"], ["slice"]])
def test_help_imports_nothing_that_takes_long(arguments):
    script = Path(sys.executable).with_name("slicegpt-fast")
    run = subprocess.run([sys.executable, "-X", "importtime", script, *arguments], capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines() if line.startswith("import time:")}
    assert {"slicegpt_fast", "slicegpt_fast.cli", "typer"} <= imported
    assert not {"numpy", "torch", "transformers", "matplotlib"} & imported
    assert run.returncode == (0 if "--help" in arguments else 2)
