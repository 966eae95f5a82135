"""Slicing from file to file gives the weights of slicing in memory, in less memory, and survives being killed."""

import errno
import fcntl
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from types import SimpleNamespace

import psutil
import pytest
import torch
from models import FAMILIES, VOCABULARY, tiny_model, tokens
from safetensors.torch import load_file, save_file
from transformers import BertConfig

from slicegpt_fast import InputError, load_model, save_model, slice_checkpoint, slice_model
from slicegpt_fast.slicing import SliceOptions, make_plan
from slicegpt_fast.slicing import memory as host
from slicegpt_fast.streaming import fits_in_memory, memory
from slicegpt_fast.streaming.memory import Needs, estimate
from slicegpt_fast.streaming.shards import Shards

PADDED = {"input_ids": tokens(2, 20, seed=1), "attention_mask": torch.ones(2, 20, dtype=torch.long)}
PADDED["attention_mask"][0, :7] = 0
CALIBRATION = [tokens(2, 32), PADDED, tokens(1, 32, seed=2)]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As the processes that are started here have: another number rounds sums differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def checkpoint(folder, model, shard_size="60KB"):
    """``model`` in several files."""
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def stored(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same(left, right):
    """The same tensors to the bit, and the same configs."""
    left_weights, right_weights = stored(left), stored(right)
    assert left_weights.keys() == right_weights.keys()
    for name, tensor in left_weights.items():
        assert tensor.dtype == right_weights[name].dtype
        assert torch.equal(tensor, right_weights[name]), name
    for config in ("config.json", "generation_config.json"):
        assert json.loads((left / config).read_text()) == json.loads((right / config).read_text())


PLANS = {
    "per-norm": dict(sparsity=0.25),
    "shared": dict(sparsity=0.25, basis="shared", signal="normalized"),
    "groups, re-fitted": dict(sparsity=0.25, basis=3, refit=True),
    "aligned, re-fitted": dict(target_params=0.85, shortcut="aligned", refit=True),
    "groups, aligned, truncated, head": dict(
        sparsity=0.25, basis=2, shortcut="aligned", shortcut_rank=3, slice_head=True
    ),
    "variance": dict(target_params=0.85, schedule="variance", round_to=1),
    "widths": dict(widths=[40, 40, 32, 32, 24, 24, 48]),
}


@pytest.mark.parametrize("activations", ["memory", "disk"])
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_gives_the_weights_of_slicing_in_memory(plan, activations, tmp_path):
    source = checkpoint(tmp_path / "dense", tiny_model())
    save_model(slice_model(load_model(source), CALIBRATION, progress=False, **PLANS[plan]), tmp_path / "expected")
    slice_checkpoint(source, tmp_path / "out", CALIBRATION, activations=activations, progress=False, **PLANS[plan])
    assert_same(tmp_path / "out", tmp_path / "expected")
    assert sorted(os.listdir(tmp_path)) == ["dense", "expected", "out"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, tmp_path):
    source = checkpoint(tmp_path / "dense", tiny_model(family))
    arguments = dict(sparsity=0.25, slice_head=True, refit=True, progress=False)
    save_model(slice_model(load_model(source), CALIBRATION, **arguments), tmp_path / "expected")
    slice_checkpoint(source, tmp_path / "out", CALIBRATION, activations="disk", **arguments)
    assert_same(tmp_path / "out", tmp_path / "expected")
    out, expected = (load_model(tmp_path / name)(tokens(1, 9)).logits for name in ("out", "expected"))
    torch.testing.assert_close(out, expected)  # of the same weights, at other addresses


ARGUMENTS = dict(target_params=0.9, basis=3, shortcut="aligned", refit=True, schedule="variance", round_to=1)
WORK = ".out.unfinished"


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a dense checkpoint and what slicing it without interruption writes."""
    folder = tmp_path_factory.mktemp("finished")
    checkpoint(folder / "dense", tiny_model())
    slice_checkpoint(folder / "dense", folder / "out", CALIBRATION, progress=False, **ARGUMENTS)
    return folder


def kill_at(write, monkeypatch):
    """Die in the ``write``-th write of tensors, which leaves half a file."""
    writes = itertools.count(1)

    def save(tensors, path, *args):
        save_file(tensors, path, *args)
        if next(writes) == write:
            path.write_bytes(path.read_bytes()[:-100])
            raise Killed

    monkeypatch.setattr("slicegpt_fast.streaming.storage.save_file", save)
    monkeypatch.setattr("slicegpt_fast.unfinished.save_file", save)


@pytest.mark.parametrize("activations", ["memory", "disk"])
def test_a_run_that_keeps_being_killed_ends_with_the_same_bytes(activations, finished, tmp_path, monkeypatch):
    """The n-th process dies in its n-th write: they die everywhere, and each comes as far as the last at least."""
    for write in itertools.count(1):
        kill_at(write, monkeypatch)
        try:
            slice_checkpoint(
                finished / "dense",
                tmp_path / "out",
                CALIBRATION,
                activations=activations,
                progress=False,
                **ARGUMENTS,
            )
            break
        except Killed:
            assert os.listdir(tmp_path) == [WORK]
    assert write > 15
    assert os.listdir(tmp_path) == ["out"]
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(finished / "out"))
    for file in (tmp_path / "out").iterdir():
        assert file.read_bytes() == (finished / "out" / file.name).read_bytes(), file.name


def test_finished_layers_are_not_visited_again(finished, tmp_path, monkeypatch):
    visited, loaded = [], Shards.loaded

    def spy(self, *parts):
        if parts == ("model.layers.2",) and not killed:
            raise Killed
        visited.append(parts[-1])
        return loaded(self, *parts)

    monkeypatch.setattr(Shards, "loaded", spy)
    arguments = dict(sparsity=0.25, progress=False)
    killed = False
    with pytest.raises(Killed):
        slice_checkpoint(finished / "dense", tmp_path / "out", CALIBRATION, **arguments)
    assert visited == ["model.norm", "model.layers.0", "model.layers.1"]  # "model.norm" is loaded with the embeddings
    visited.clear()
    killed = True
    slice_checkpoint(finished / "dense", tmp_path / "out", CALIBRATION, **arguments)
    assert visited[:3] == ["model.norm", "model.layers.2", "model.norm"]
    assert visited[3:] == ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2", "lm_head"]


SAMPLE = torch.randint(3, VOCABULARY, (4, 4, 80), generator=torch.Generator().manual_seed(0)).unbind()

PROGRAM = """
import os, re, signal, sys, threading, time
import torch, transformers.models.llama.modeling_llama
from slicegpt_fast.streaming import storage
from slicegpt_fast import slice_checkpoint

source, folder, kill_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
calibration = torch.randint(3, 97, (4, 4, 80), generator=torch.Generator().manual_seed(0)).unbind()
save, writes, peak, done = storage.save_file, 0, 0, False

def count(*args):
    global writes
    save(*args)
    writes += 1
    if writes == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.0005)

storage.save_file = count
(torch.rand(512, 512) @ torch.rand(512, 512)).sum(), torch.linalg.eigh(torch.eye(256).double())  # libraries at work
before = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
slice_checkpoint(source, folder, calibration, sparsity=0.25, activations="disk", device="cpu", progress=False)
done = True
watcher.join()
print(peak - before)
"""


def run_program(*arguments, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, **options)


def test_memory_of_many_layers_and_sigkill(tmp_path):
    """Killed for good, a process goes on to the same bytes, and holds to its estimate and to little memory."""
    sizes = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=32, head_dim=64)
    source = checkpoint(tmp_path / "dense", tiny_model(**sizes), shard_size="20MB")
    killed = run_program(source, tmp_path / "out", 110)  # of 4 and 12 for every layer: in the 9th
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    growth = int(run_program(source, tmp_path / "out", 0, check=True).stdout)

    model = load_model(source)
    save_model(slice_model(model, SAMPLE, sparsity=0.25, progress=False), tmp_path / "expected")
    assert_same(tmp_path / "out", tmp_path / "expected")
    plan = make_plan(model, SliceOptions(sparsity=0.25))
    batches = [{"input_ids": batch} for batch in SAMPLE]
    needs = estimate(model, plan, batches, SliceOptions(sparsity=0.25))
    assert growth < needs.working < model.get_memory_footprint() / 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 0.5}, r"differs in sparsity \(0\.25 there, 0\.5 now\): repeat its command to go on, or delete"),
        ({"refit": True, "basis": 2}, r"differs in basis \(per-norm there, 2 now\), refit \(False there, True now\):"),
        ({"dtype": torch.bfloat16}, r"differs in dtype \(torch\.float32 there, torch\.bfloat16 now\):"),
    ],
)
def test_another_option_is_not_resumed(change, message, finished, tmp_path, monkeypatch):
    unfinished(finished / "dense", tmp_path, monkeypatch)
    with pytest.raises(InputError, match=message):
        slice_checkpoint(
            finished / "dense", tmp_path / "out", CALIBRATION, progress=False, **{"sparsity": 0.25} | change
        )
    assert os.listdir(tmp_path) == [WORK]


def test_another_text_is_not_resumed(finished, tmp_path, monkeypatch):
    unfinished(finished / "dense", tmp_path, monkeypatch)
    text = [*CALIBRATION[:-1], tokens(1, 32, seed=3)]
    with pytest.raises(InputError, match="differs in calibration text: repeat"):
        slice_checkpoint(finished / "dense", tmp_path / "out", text, sparsity=0.25, progress=False)


def test_another_model_is_not_resumed(finished, tmp_path, monkeypatch):
    dense = shutil.copytree(finished / "dense", tmp_path / "dense")
    unfinished(dense, tmp_path, monkeypatch)
    file = sorted(dense.glob("*.safetensors"))[2]
    weights = load_file(file)
    next(iter(weights.values())).flatten()[5] += 1
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(InputError, match=f"differs in {file.name}: repeat"):
        slice_checkpoint(dense, tmp_path / "out", CALIBRATION, sparsity=0.25, progress=False)


def test_a_run_of_another_version_is_not_resumed(finished, tmp_path, monkeypatch):
    unfinished(finished / "dense", tmp_path, monkeypatch)
    versions = {"slicegpt-fast": "0.0.1"}
    monkeypatch.setattr("slicegpt_fast.streaming.version", lambda name: versions.get(name) or version(name))
    with pytest.raises(InputError, match=r"differs in slicegpt-fast \(\S+ there, 0\.0\.1 now\): repeat"):
        slice_checkpoint(finished / "dense", tmp_path / "out", CALIBRATION, sparsity=0.25, progress=False)


def test_a_half_deleted_run_is_not_resumed(finished, tmp_path, monkeypatch):
    unfinished(finished / "dense", tmp_path, monkeypatch)
    (tmp_path / WORK / "settings.json").unlink()
    slice_checkpoint(finished / "dense", tmp_path / "out", CALIBRATION, progress=False, **ARGUMENTS)
    assert_same(tmp_path / "out", finished / "out")
    assert os.listdir(tmp_path) == ["out"]


def unfinished(source, folder, monkeypatch):
    """Leave the work folder of a killed run."""
    with monkeypatch.context() as patch:
        kill_at(12, patch)
        with pytest.raises(Killed):
            slice_checkpoint(source, folder / "out", CALIBRATION, sparsity=0.25, progress=False)


def test_bad_input_leaves_nothing_but_a_full_disk_can_be_resumed_from(finished, tmp_path, monkeypatch):
    source, out = finished / "dense", tmp_path / "out"
    with pytest.raises(InputError, match="calibration has 20 tokens"):
        slice_checkpoint(source, out, [tokens(1, 20)], sparsity=0.25, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
        with pytest.raises(InputError, match=r"needs up to 0\.00 GB, but only 0\.00 GB are free: make room first"):
            slice_checkpoint(source, out, CALIBRATION, sparsity=0.25, progress=False)
    assert os.listdir(tmp_path) == []
    with monkeypatch.context() as patch:
        patch.setattr("slicegpt_fast.unfinished.save_file", raises(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(
            InputError, match=r"stopped \(.*No space left on device\): put that right, the same command"
        ):
            slice_checkpoint(source, out, CALIBRATION, sparsity=0.25, progress=False)
    assert os.listdir(tmp_path) == [WORK]
    slice_checkpoint(source, out, CALIBRATION, sparsity=0.25, progress=False)
    assert os.listdir(tmp_path) == ["out"]


def test_bad_input_leaves_the_work_of_an_earlier_run(finished, tmp_path, monkeypatch):
    unfinished(finished / "dense", tmp_path, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setenv("SLICEGPT_FAST_BACKEND", "fast")
        with pytest.raises(InputError, match="SLICEGPT_FAST_BACKEND"):
            slice_checkpoint(finished / "dense", tmp_path / "out", CALIBRATION, sparsity=0.25, progress=False)
    assert os.listdir(tmp_path) == [WORK]
    slice_checkpoint(finished / "dense", tmp_path / "out", CALIBRATION, sparsity=0.25, progress=False)
    assert os.listdir(tmp_path) == ["out"]


def raises(error):
    def fail(*_):
        raise error

    return fail


def test_one_process_at_a_time(finished, tmp_path, monkeypatch):
    unfinished(finished / "dense", tmp_path, monkeypatch)
    with (tmp_path / WORK / "settings.json").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is working in"):
            slice_checkpoint(finished / "dense", tmp_path / "out", CALIBRATION, sparsity=0.25, progress=False)


class TestCheckpoints:
    @pytest.fixture
    def dense(self, finished, tmp_path):
        return shutil.copytree(finished / "dense", tmp_path / "dense")

    def run(self, dense, **arguments):
        arguments = {"sparsity": 0.25, "basis": "shared", "progress": False} | arguments
        return slice_checkpoint(dense, dense.with_name("out"), CALIBRATION, **arguments)

    @pytest.mark.parametrize("tied", [False, True])
    def test_one_file_in_another_dtype_without_a_dtype_in_its_config(self, tied, tmp_path):
        tiny_model(tied=tied, dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
        config = json.loads((tmp_path / "dense" / "config.json").read_text())
        del config["dtype"]
        (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
        for dtype in (None, torch.float32):
            model = load_model(tmp_path / "dense", dtype=dtype)
            expected = slice_model(model, CALIBRATION, sparsity=0.25, progress=False).state_dict()
            out = tmp_path / f"{dtype}"
            slice_checkpoint(tmp_path / "dense", out, CALIBRATION, sparsity=0.25, dtype=dtype, progress=False)
            for name, tensor in load_model(out).state_dict().items():
                assert tensor.dtype == expected[name].dtype
                assert torch.equal(tensor, expected[name])

    def test_names_without_the_prefix_of_the_base_model(self, dense):
        """As in GPT-2's own checkpoint."""
        for file in [*dense.glob("*.safetensors")]:
            save_file({name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}, file)
        self.run(dense)
        load_model(dense.with_name("out"))

    def test_missing_file(self, dense):
        next(dense.glob("*.safetensors")).unlink()
        with pytest.raises(
            InputError, match=r"has no model-0000.-of-0000.\.safetensors: give a folder with a complete"
        ):
            self.run(dense)

    def test_missing_tensor(self, dense):
        for file in dense.glob("*.safetensors"):
            kept = {name: tensor for name, tensor in load_file(file).items() if "layers.1.mlp.up_proj" not in name}
            save_file(kept, file)
        with pytest.raises(InputError, match=r"lacks weights \(such as model\.layers\.1\.mlp\.up_proj\.weight\)"):
            self.run(dense)

    def test_wrong_shape(self, dense):
        for file in dense.glob("*.safetensors"):
            save_file({name: tensor[:-1].clone() for name, tensor in load_file(file).items()}, file)
        with pytest.raises(InputError, match=r"has shape \[96, 48\], its config asks for \[97, 48\]: the files do not"):
            self.run(dense)

    def test_damaged_file(self, dense):
        file = next(dense.glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-10])
        with pytest.raises(InputError, match=f"{file.name} is damaged"):
            self.run(dense)

    def test_damaged_index(self, dense):
        (dense / "model.safetensors.index.json").write_text("{}")
        with pytest.raises(InputError, match=r"index\.json is damaged"):
            self.run(dense)

    def test_another_kind_of_model_is_refused(self, tmp_path):
        BertConfig().save_pretrained(tmp_path / "bert")
        with pytest.raises(InputError, match="model type 'bert' cannot be sliced"):
            self.run(tmp_path / "bert")

    def test_a_sliced_checkpoint_is_refused(self, dense):
        self.run(dense)
        with pytest.raises(InputError, match="the model is sliced or quantised already"):
            slice_checkpoint(dense.with_name("out"), dense.with_name("again"), CALIBRATION, sparsity=0.25)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"sparsity": 2}, "sparsity must be"),
            (
                {"sparsity": None, "basis": None, "target_params": 0.8},
                "target_params without a basis cuts by gradients, .* give basis=",
            ),
            ({"sparsity": None, "basis": None, "target_params": 0.8, "cut": ("channels",)}, "cuts by gradients"),
            ({"activations": "tape"}, "activations must be one of 'auto', 'device', 'memory', 'disk', not 'tape'"),
        ],
    )
    def test_bad_arguments(self, arguments, message, dense):
        with pytest.raises(InputError, match=message):
            self.run(dense, **arguments)
        assert os.listdir(dense.parent) == ["dense"]

    def test_a_hub_id(self, dense, monkeypatch):
        monkeypatch.setattr(
            "slicegpt_fast.checkpoint.snapshot_download", lambda id, **_: {"some/model": str(dense)}[id]
        )
        slice_checkpoint("some/model", dense.with_name("out"), CALIBRATION, sparsity=0.25, progress=False)
        expected = slice_model(load_model(dense), CALIBRATION, sparsity=0.25, progress=False).state_dict()
        for name, tensor in load_model(dense.with_name("out")).state_dict().items():
            assert torch.equal(tensor, expected[name])

    def test_an_unknown_hub_id_offline(self, dense, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(InputError, match="cannot load nobody/nothing: "):
            slice_checkpoint("nobody/nothing", dense.with_name("out"), CALIBRATION, sparsity=0.25)

    def test_a_single_file(self, dense):
        file = dense / "dense.gguf"
        file.touch()
        with pytest.raises(InputError, match=r"dense\.gguf is a single file: give a folder with a safetensors"):
            slice_checkpoint(file, dense.with_name("out"), CALIBRATION, sparsity=0.25)

    def test_no_such_folder_and_a_folder_in_use(self, dense):
        with pytest.raises(InputError, match="does not exist: give a hub id, a local folder"):
            self.run(dense / "missing")
        with pytest.raises(InputError, match="exists and is not an empty folder"):
            slice_checkpoint(dense, dense.parent, CALIBRATION, sparsity=0.25)


@pytest.fixture
def free(tmp_path, monkeypatch):
    """Sets what is free of the host's memory; the container has no limit."""

    def set_free(size):
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=size))

    monkeypatch.setattr(host, "CGROUP", tmp_path / "cgroup")
    return set_free


@pytest.mark.parametrize(
    ("size", "place"), [(10**9, torch.device("cpu")), (1_002_000, torch.device("cpu")), (1_001_000, None)]
)
def test_activations_are_kept_where_they_fit(size, place, free):
    needs = Needs(working=900_000, activations=1000, disk=0)
    free(size)
    assert memory.activations_device("auto", torch.device("cpu"), needs) == place


def test_a_model_its_copy_and_activations_fit_in_memory_or_not(finished, free):
    size = load_model(finished / "dense").get_memory_footprint()
    enough = int(2 * size / memory.FREE_SHARE)
    for available, dtype, fits in [(enough + 2, None, True), (enough, None, False), (enough, torch.bfloat16, True)]:
        free(available)
        assert fits_in_memory(finished / "dense", dtype=dtype, device="cpu") == fits
    free(enough + 2)
    assert not fits_in_memory(finished / "dense", device="cpu", tokens=1)
    free(enough + 2 + int(1000 * 48 * 4 / memory.FREE_SHARE))
    assert fits_in_memory(finished / "dense", device="cpu", tokens=1000)
    assert fits_in_memory("model.gguf", device="cpu")


def test_a_model_for_a_gpu_is_loaded_to_host_memory_first(finished, free, monkeypatch):
    size = load_model(finished / "dense").get_memory_footprint()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * size, 10 * size))
    for available, fits in [(1.2 * size, True), (size, False)]:
        free(available)
        assert fits_in_memory(finished / "dense", device="cuda") == fits


@pytest.mark.parametrize(("limit", "expected"), [("max", 1000), ("900", 900 - 700 + 200), ("5000", 1000)])
def test_a_container_may_use_less_than_is_free(limit, expected, free, monkeypatch):
    free(1000)
    files = {"max": limit, "current": "700", "stat": "anon 400\ninactive_file 200\nactive_file 100"}
    host.CGROUP.mkdir()
    for name, content in files.items():
        (host.CGROUP / f"memory.{name}").write_text(f"{content}\n")
    assert host.free_memory(torch.device("cpu")) == expected
