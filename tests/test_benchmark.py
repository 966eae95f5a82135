"""Speeds belong to the model and harness they are reported for; floors and shares follow from what was counted."""

import json
from io import StringIO
from statistics import median

import matplotlib.image
import pytest
import torch
from models import tiny_model, tokens
from rich.console import Console

from slicegpt_fast import InputError
from slicegpt_fast.benchmark import HARNESSES, _probes, benchmark, floor_seconds, machine_rates
from slicegpt_fast.evaluation import flops_per_token, read_bytes, stored_parameters
from slicegpt_fast.plots import plot_speeds
from slicegpt_fast.tables import speed_notes, speed_table


@pytest.fixture(autouse=True)
def small_rates(monkeypatch):
    """The rates of the machine are no matter here: measure them on little data."""
    monkeypatch.setattr("slicegpt_fast.benchmark.PROBES", {"cpu": (1 << 16, 64)})
    _probes.cache_clear()


@pytest.fixture(autouse=True)
def no_code_generation(monkeypatch):
    """Graphs are traced whole, but run by torch's own kernels: compiling C++ takes too long here."""
    whole = torch.compile

    def traced(model, *, fullgraph, mode="default"):
        assert fullgraph
        return whole(model, fullgraph=True, backend="eager")

    torch._dynamo.reset()
    monkeypatch.setattr("torch.compile", traced)


def passes_of(model, log, name):
    model.register_forward_hook(
        lambda _, __, kwargs, ___: log.append((name, kwargs["input_ids"].shape[1])), with_kwargs=True
    )
    return model


def test_models_take_turns():
    log = []
    models = {name: passes_of(tiny_model(num_hidden_layers=layers), log, name) for name, layers in (("a", 1), ("b", 2))}
    speeds = benchmark(models, tokens(2, 40), new_tokens=3, rounds=2)
    assert log == [("a", 40), ("a", 1), ("a", 1), ("a", 1), ("b", 40), ("b", 1), ("b", 1), ("b", 1)] * 3
    assert [(row.model, row.harness) for row in speeds.rows] == [("a", "eager"), ("b", "eager")]


def test_figures_follow_from_the_measured_seconds():
    model = tiny_model()
    speeds = benchmark({"dense": model}, tokens(2, 40), new_tokens=3, rounds=3)
    (row,) = speeds.rows
    assert len(row.prefill_seconds) == len(row.decode_seconds) == 3
    assert row.prefill == pytest.approx(80 / median(row.prefill_seconds))
    assert row.decode == pytest.approx(6 / median(row.decode_seconds))
    rates = speeds.read_bandwidth, speeds.matmul_rate
    assert row.prefill_share == pytest.approx(floor_seconds(model, 80, 2, *rates) * row.prefill / 80)
    assert row.decode_share == pytest.approx(floor_seconds(model, 2, 2, *rates) * row.decode / 2)
    assert speeds.stored_parameters == {"dense": stored_parameters(model)}
    assert speeds.flops_per_token == {"dense": flops_per_token(model)}
    assert json.loads(json.dumps(speeds.settings))["dtype"] == "float32"


@pytest.mark.parametrize("harness", [name for name in HARNESSES if name != "generate"])
@torch.no_grad()
def test_every_harness_gives_the_model_all_tokens(harness):
    """The logits of the last step are those of one pass over the whole sequence, also when a cache is used again."""
    model, prompt = tiny_model(num_hidden_layers=1), tokens(2, 9)
    way = HARNESSES[harness](model, 13)
    for _ in range(2):
        output, ids = way.prefill(input_ids=prompt, past_key_values=way.cache(), logits_to_keep=1), prompt
        for _ in range(4):
            ids = torch.cat((ids, output.logits[:, -1:].argmax(-1)), 1)
            output = way.decode(input_ids=ids[:, -1:], past_key_values=output.past_key_values)
        torch.testing.assert_close(output.logits[:, -1], model(ids).logits[:, -1], rtol=1e-4, atol=1e-4)


def test_generate_is_timed_from_its_tokens():
    """As many tokens as asked for, also behind an end-of-sequence token."""
    model = tiny_model(num_hidden_layers=1)
    model.generation_config.eos_token_id = list(range(3, 97))
    calls = []
    model.register_forward_hook(lambda module, arguments, output: calls.append(output.logits.shape[1]))
    prefill, decode = HARNESSES["generate"](model, 13)(tokens(1, 9), 4)
    assert len(calls) == 5
    assert min(prefill, decode) > 0


def test_every_harness_is_measured():
    models = {"dense": tiny_model(num_hidden_layers=1)}
    speeds = benchmark(models, tokens(1, 8), new_tokens=2, rounds=1, harnesses=list(HARNESSES))
    assert [(row.model, row.harness) for row in speeds.rows] == [("dense", harness) for harness in HARNESSES]
    assert all(row.prefill > 0 and row.decode > 0 for row in speeds.rows)


def test_the_floor():
    """Reading the weights binds one token, multiplying them many; the head sees the scored tokens alone."""
    model = tiny_model()
    flops, head = flops_per_token(model), 2 * 97 * 48
    assert floor_seconds(model, 1, 1, 1.0, 1e9) == read_bytes(model) == 4 * flops / 2
    assert floor_seconds(model, 100, 1, 1e12, 1.0) == 100 * (flops - head) + head
    assert floor_seconds(model, 100, 100, 1e12, 2.0) == 50 * flops
    tied = tiny_model(tied=True)
    assert read_bytes(tied) == read_bytes(model)  # a pass reads the head, tied or not


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rates_are_positive(dtype):
    assert min(machine_rates(torch.device("cpu"), dtype)) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(harnesses=["quick"]), r"^harness is 'quick'; it must be one of eager, generate, compile, static\.$"),
        (
            dict(new_tokens=121),
            r"^a prompt of 8 and 121 new tokens are more than the model's 128 positions: lower one of them\.$",
        ),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(InputError, match=message):
        benchmark({"dense": tiny_model()}, tokens(1, 8), **arguments)


def test_a_harness_that_cannot_run_a_model():
    def broken(*_, **__):
        raise ValueError("no such cache.\nTrace: ...")

    model = tiny_model()
    model.forward = broken
    message = r"^the eager harness cannot run the dense model \(no such cache\): leave that harness out\.$"
    with pytest.raises(InputError, match=message):
        benchmark({"dense": model}, tokens(1, 8), rounds=1)


def test_table_and_plot(tmp_path):
    model = tiny_model()
    speeds = benchmark({"dense": model, "again": model}, tokens(1, 8), new_tokens=2, rounds=1)
    page = StringIO()
    Console(width=120, file=page).print(speed_table("A model", speeds, speed_notes(speeds)))
    lines = [line.replace("│", "").split() for line in page.getvalue().splitlines()]
    for row in speeds.rows:
        (cells,) = (line for line in lines if line[:2] == ["eager", row.model])
        assert cells[2] == f"{row.prefill:.1f}"
        assert cells[4:6] == [f"{row.prefill_share:.0%}", f"{row.decode:.1f}"]
        assert cells[6] == f"{row.decode / speeds.rows[0].decode:.2f}"
    plot_speeds("A model", speeds, tmp_path / "speeds.png")
    assert matplotlib.image.imread(tmp_path / "speeds.png").shape == (750, 1800, 4)
