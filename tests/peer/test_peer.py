"""transformers' own model tests, over models that are sliced or patched as they are made.

Each that fails stands here beside its reason. They come with the source distribution of transformers, which pip
downloads once into the cache of slicegpt-fast.
"""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

import pytest
import transformers

from slicegpt_fast.quickstart import Package, cached

VERSION = "5.23.0"  # that the tables below belong to
RAN = 720  # tests at least, in every mode; the others skip small models, encoders, GPUs
ALL = ("falcon", "gpt2", "llama", "mixtral", "opt", "phi", "qwen3")

# The tests that fail by mode, each with the reason and the families in which it fails.
RESHAPED = "it holds a sliced model against a dense one made from the same config, and they have other tensors"
SLICED = {
    "test_attention_outputs": ("it builds a second model from the first one's config, which is refused", ALL),
    "test_can_init_all_missing_weights": (RESHAPED, ("falcon", "mixtral", "phi", "qwen3")),
    "test_correct_missing_keys": ("it saves the model without its head, which is refused", ALL),
    "test_from_pretrained_no_checkpoint": (RESHAPED, ALL),
    "test_model_weights_reload_no_missing_tied_weights": ("it loads a file that lacks all weights: refused", ALL),
    "test_tied_weights_keys": ("slicing makes two tables of a tied one", ALL),
}
CUT = {
    "test_base_model_prefix_loads_base_weights": (
        "no tensor keeps its shape where experts have no biases",
        ("mixtral",),
    ),
    "test_hidden_states_output": ("hidden states have the kept width, not the config's", ALL),
}
TRANSPOSED = ("a Conv1D's weight is a view of what one op reads: transposed", ("gpt2",))
FAILURES: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
    "stock": {},
    "patched": {
        "test_tied_weights_keys": (
            "it takes views of one matrix for tied weights",
            ("llama", "mixtral", "opt", "phi", "qwen3"),
        ),
        "test_load_contiguous_weights": TRANSPOSED,
    },
    "sliced": SLICED | CUT,
    "sliced-patched": SLICED | {"test_load_contiguous_weights": TRANSPOSED},
}


@pytest.fixture(scope="module")
def distribution():
    """The folder of the unpacked source distribution."""
    if transformers.__version__ != VERSION:
        pytest.skip(f"the failures of transformers {VERSION} are listed, this is {transformers.__version__}")
    folder = cached(Package("transformers", VERSION, "tests", ""))
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=".partial-") as partial:
            options = ["--no-deps", "--no-binary", "transformers", "--no-build-isolation", "--dest", partial]
            command = [sys.executable, "-m", "pip", "download", "--quiet", *options, f"transformers=={VERSION}"]
            subprocess.run(command, check=True)
            (archive,) = Path(partial).glob("*.tar.gz")
            with tarfile.open(archive) as content:
                content.extractall(partial, filter="data")
            (Path(partial) / f"transformers-{VERSION}").replace(folder)
    return folder


def run(mode, distribution, tmp_path):
    """How many tests passed, and the names of those that failed as "family test", with the last line of each error."""
    suite, report = Path(__file__).with_name("suite.py"), tmp_path / "report.xml"
    options = ["-q", "-c", os.devnull, "--rootdir", suite.parent, "-o", "python_files=suite.py", "--junitxml", report]
    command = [sys.executable, "-m", "pytest", suite, *options, "-p", "no:cacheprovider", "--timeout", "120"]
    environment = os.environ | {"PEER_FOLDER": str(distribution), "PEER_MODE": mode, "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, env=environment, capture_output=True)
    passed, failed = 0, {}
    for case in ElementTree.parse(report).iter("testcase"):
        problem = next((case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None)
        if problem is not None:
            family = re.sub(r".*Test_", "", case.get("classname"))
            failed[f"{family} {case.get('name')}"] = problem.get("message", "").splitlines()[:1]
        elif case.find("skipped") is None:
            passed += 1
    return passed, failed


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "mode",
    [
        pytest.param("stock", marks=pytest.mark.thorough),
        pytest.param("sliced", marks=pytest.mark.thorough),
        "patched",
        "sliced-patched",
    ],
)
def test_the_common_tests_of_transformers(mode, distribution, tmp_path):
    expected = {f"{family} {test}" for test, (_, families) in FAILURES[mode].items() for family in families}
    passed, failed = run(mode, distribution, tmp_path)
    assert {name: message for name, message in failed.items() if name not in expected} == {}
    assert expected - failed.keys() == set()
    assert passed + len(failed) >= RAN
