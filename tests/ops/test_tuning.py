"""Tuning: what is measured, what the table keeps of it, and what ``auto`` makes of that."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from compile_ahead import GPUS
from tune import block_shapes

from slicegpt_fast.errors import InputError
from slicegpt_fast.kernels import measured
from slicegpt_fast.kernels.native import build_info
from slicegpt_fast.ops import dispatch, kernel_table, norm_linear, tuning
from slicegpt_fast.ops.dispatch import OPS, Request
from slicegpt_fast.ops.tuning import Shape, tune
from slicegpt_fast.triton_kernels import tiles
from slicegpt_fast.triton_kernels.launch import INTERPRETER

CUDA = torch.device("cuda", 0)
HALF = torch.float16
SHAPES = [
    Shape("norm_linear", 3, 48, 40, "silu_gate"),
    Shape("norm_linear", 20, 24, 40),
    Shape("residual_linear", 3, 24, 64, "dense"),
    Shape("residual_linear", 20, 24, 64, "low rank"),
    Shape("residual_linear", 20, 24, 64, "add"),
    Shape("norm_linear", 20, 24, 41),
    Shape("residual_linear", 20, 23, 64, "add"),
    Shape("residual_linear", 20, 48, 72, "dense"),
    Shape("covariance_", 40, 24, 24),
    Shape("covariance_", 40, 24, 24, "row scale"),
]


ON_GPU = sorted(op.name for op in OPS.values() if any(rule.by_measurement for rule in op.rules))


@pytest.fixture
def clock(monkeypatch):
    """Runs what is to be timed once and gives each backend a time by its name, here or in the interpreter."""
    times = {"reference": 9.0, "cpu": 8.0, "triton": 7.0}
    running = []
    for op in OPS.values():
        for name, backend in op.backends.items():

            def run(*arguments, name=name, backend=backend):
                running.append((name, arguments))
                return backend.run(*arguments)

            monkeypatch.setitem(op.backends, name, replace(backend, run=run))

    def microseconds(call):
        call()
        return times[running[-1][0]]

    monkeypatch.setattr(tuning, "current_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(tuning, "microseconds", microseconds)
    return times, running


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_every_backend_and_tile_is_measured(cache, clock):
    times, running = clock
    for shape, us in tune(SHAPES, HALF):
        assert us == dict(sorted(times.items(), key=lambda item: item[1]))
        assert list(us) == ["triton", "cpu", "reference"]
        ran = [arguments for name, arguments in running if name == "triton"][::2]  # once to see that it is right
        arguments = ran[0] if shape.op == "covariance_" else ran[0][:-1]  # the last is the tile
        request = OPS[shape.op].request(*arguments)
        assert (request.op, *request.shape, request.epilogue) == shape
        entry = measured.lookup("cpu", shape.op, measured.bucket(HALF, request.shape, request.epilogue))
        assert entry.us == times
        if shape.op != "covariance_":
            aligned = shape.k % 8 == 0 and (shape.op == "norm_linear" or shape.n % 8 == 0)
            every = tiles.tiles_for(INTERPRETER, HALF, shape.m, aligned, shape.epilogue)
            assert [arguments[-1] for arguments in ran] == list(every)
            assert entry.tile in [tile.__dict__ for tile in every]
        running.clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[4], SHAPES[8]], ids=lambda shape: shape.op)
def test_a_kernel_that_is_wrong_is_left_out(shape, cache, clock, monkeypatch):
    op = OPS[shape.op]
    right = op.backends["cpu"].run

    def wrong(first, *arguments):
        returned = right(first, *arguments)
        result = first if returned is None else returned[0] if isinstance(returned, tuple) else returned
        result.mul_(1.5)
        return returned

    monkeypatch.setitem(op.backends, "cpu", replace(op.backends["cpu"], run=wrong))
    with pytest.warns(UserWarning, match=r"^cpu gives wrong results for Shape\("):
        ((_, us),) = tune([shape], HALF)
    assert "cpu" not in us
    assert {"triton", "reference"} == us.keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize("at", [(slice(None), 7), (5, slice(None))], ids=["column", "row"])
def test_a_kernel_with_one_wrong_column_or_row_is_left_out(at, cache, clock, monkeypatch):
    op = OPS["norm_linear"]
    right = op.backends["cpu"].run

    def wrong(*arguments):
        result = right(*arguments)
        result[at] = 0
        return result

    monkeypatch.setitem(op.backends, "cpu", replace(op.backends["cpu"], run=wrong))
    monkeypatch.delitem(op.backends, "triton")  # interpreted, that many tiles take long
    with pytest.warns(UserWarning, match=r"^cpu gives wrong results for Shape\("):
        ((_, us),) = tune([Shape("norm_linear", 2500, 2500, 8)], HALF)
    assert "cpu" not in us


@pytest.mark.parametrize("op", ["norm_linear", "residual_linear"])
def test_no_product_of_fp16_operands_overflows(op):
    shape = (4, 64, 1 << 16)
    epilogue = {"norm_linear": "silu_gate", "residual_linear": "dense"}[op]
    arguments = OPS[op].operands(Request(op, torch.device("cpu"), HALF, "decode", shape, epilogue))
    for result in tuning.results_of(OPS[op].backends["reference"].run, arguments):
        assert result.abs().max() < 32 if result.dtype == HALF else result.isfinite().all()


@pytest.fixture
def hopper(monkeypatch):
    """A GPU to choose for, on which every backend can run everything."""
    monkeypatch.setattr(Request, "capability", property(lambda self: (9, 0)))
    monkeypatch.setattr(measured, "gpu_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(dispatch.Op, "refusal", lambda self, backend, request: None)


def request(op="norm_linear", m=4096, epilogue=None):
    return Request(op, CUDA, torch.bfloat16, OPS[op].regime(m), (m, 4096, 2872), epilogue)


def record(asked, tile=None, **us):
    bucket = measured.bucket(asked.dtype, asked.shape, asked.epilogue)
    measured.record("NVIDIA H200", asked.op, bucket, measured.Entry(us, tile))


@pytest.mark.parametrize("op", ON_GPU)
@pytest.mark.parametrize(
    ("us", "chosen"),
    [
        ({}, "reference"),
        ({"triton": 1.0}, "reference"),  # not compared with the reference
        ({"reference": 3.0, "triton": 2.0, "cuda": 1.0}, "cuda"),
        ({"reference": 3.0, "triton": 2.0}, "triton"),
        ({"reference": 1.0, "triton": 2.0, "cuda": 3.0}, "reference"),
        ({"reference": 3.0, "cpu": 1.0, "triton": 2.0}, "triton"),  # the row names no cpu
    ],
)
def test_auto_takes_the_fastest_measured(op, us, chosen, cache, hopper):
    for m in (16, 4096):
        assert OPS[op].choose("auto", request(op, m)) == "reference"
        record(request(op, m), **us)
        assert OPS[op].choose("auto", request(op, m)) == chosen


@pytest.mark.parametrize(
    ("op", "shape", "revision", "capability", "chosen"),
    [
        ("norm_linear", (16, 4096, 2872), None, (9, 0), "cuda"),
        ("covariance_", (512, 2872, 2872), None, (9, 0), "cuda"),
        ("norm_linear", (16, 4096, 2871), None, (9, 0), "reference"),  # rows that are not aligned
        ("residual_linear", (16, 2871, 4096), None, (9, 0), "reference"),
        ("norm_linear", (16, 4096, 2872), "of another build", (9, 0), "reference"),
        ("norm_linear", (16, 4096, 2872), None, (8, 0), "reference"),
        ("norm_linear", (16, 4096, 2872), None, (10, 0), "reference"),
    ],
)
def test_untuned_hopper_runs_the_cuda_kernels_that_passed(
    op, shape, revision, capability, chosen, cache, hopper, monkeypatch
):
    asked = Request(op, CUDA, torch.bfloat16, OPS[op].regime(shape[0]), shape)
    monkeypatch.setattr(Request, "capability", property(lambda self: capability))
    measured.record_passed("NVIDIA A100", "cuda", build_info().revision)
    measured.record_passed("NVIDIA H200", "triton", build_info().revision)
    assert OPS[op].choose("auto", asked) == "reference"
    measured.record_passed("NVIDIA H200", "cuda", revision or build_info().revision)
    assert OPS[op].choose("auto", asked) == chosen
    record(asked, reference=1.0, cuda=2.0)  # measurement overrules
    assert OPS[op].choose("auto", asked) == "reference"


def test_a_measurement_is_of_one_epilogue_and_one_bucket_of_rows(cache, hopper):
    record(request(m=4096, epilogue="silu_gate"), reference=3.0, cuda=1.0)
    choose = partial(OPS["norm_linear"].choose, "auto")
    assert choose(request(m=2049, epilogue="silu_gate")) == "cuda"
    assert choose(request(m=2048, epilogue="silu_gate")) == "reference"
    assert choose(request(m=4096)) == "reference"


def test_rows_that_share_a_measurement():
    groups = [(1,), (2, 8), (9, 16), (17, 32), (4097, 8192, 8193, 10**6)]
    keys = [{measured.bucket(HALF, (m, 8, 8), None) for m in group} for group in groups]
    assert [len(same) for same in keys] == [1] * len(groups)
    assert len(set.union(*keys)) == len(groups)
    assert len(measured.BUCKETS) == len({measured.bucket(HALF, (m, 8, 8), None) for m in range(1, 9000)})


def test_what_was_measured_but_cannot_run_is_passed_over(cache, hopper, monkeypatch):
    record(request(), reference=3.0, triton=2.0, cuda=1.0)
    refusals = {"cuda": "built without CUDA"}
    monkeypatch.setattr(dispatch.Op, "refusal", lambda self, backend, request: refusals.get(backend))
    assert OPS["norm_linear"].choose("auto", request()) == "triton"


@pytest.mark.parametrize(
    "table",
    [
        "{",
        "[]",
        '{"NVIDIA H200": []}',
        '{"NVIDIA H200": {"norm_linear": {"KEY": {"tile": {"m": 1}, "kernel_us": 1.0, "reference_us": 2.0}}}}',
        '{"NVIDIA H200": {"norm_linear": {"KEY": {"us": {"reference": "fast"}}}}}',
        '{"NVIDIA H200": {"norm_linear": {"KEY": {"us": {"reference": 2.0, "quantum": 1.0}, "tile": {"x": 1}}}}}',
    ],
)
@pytest.mark.filterwarnings("ignore:.* is no table of measurements")
def test_old_and_foreign_tables_count_as_unmeasured(table, cache, hopper):
    key = measured.bucket(torch.bfloat16, (4096, 4096, 2872), None)
    measured.user_table().parent.mkdir()
    measured.user_table().write_text(table.replace("KEY", key))
    assert OPS["norm_linear"].choose("auto", request()) == "reference"
    tile = tiles.choose_tile(GPUS["sm_90"], "norm_linear", torch.bfloat16, 4096, 4096, 2872, True, None, False)
    assert tile in tiles.TILES[9]
    record(request(), reference=2.0, triton=1.0)
    assert OPS["norm_linear"].choose("auto", request()) == "triton"


def test_records_add_up(cache):
    for n in (8, 16):
        measured.record("NVIDIA H200", "norm_linear", measured.bucket(HALF, (32, n, 8), None), measured.Entry({}))
    assert len(json.loads(measured.user_table().read_text())["NVIDIA H200"]["norm_linear"]) == 2
    assert [path.name for path in (cache / "slicegpt-fast").iterdir()] == ["tuned.json"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device to tune for")
def test_tune_without_a_gpu():
    with pytest.raises(InputError, match="no CUDA device"):
        list(tune(block_shapes(2872, 4096, 4096, 11008, [16]), torch.bfloat16))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_plans_are_made_anew_after_tuning(cache, clock):
    h, weight = torch.randn(3, 40).half(), torch.randn(48, 40).half()
    norm_linear(h, weight, None, 1e-5, 40)
    assert OPS["norm_linear"]._plans
    list(tune(SHAPES[:1], HALF))
    assert not OPS["norm_linear"]._plans


def test_kernel_table_says_what_is_measured(cache, hopper, monkeypatch):
    rows = kernel_table()
    assert {row["op"] for row in rows} == set(OPS)
    on_gpu = [row for row in rows if row["device"] != "cpu"]
    assert {row["backend"] for row in on_gpu} == {"fastest of triton, cuda, reference"}
    if not torch.cuda.is_available():
        assert all(row["why"].endswith("reference: there is no CUDA device here") for row in on_gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for m in (1, 16):
        record(request(m=m), reference=2.0, triton=1.0)
    why = {(row["op"], row["regime"]): row["why"] for row in kernel_table() if row["device"] != "cpu"}
    assert why["norm_linear", "decode"].endswith("; measured at 2 shapes, reference at all others")
    assert why["norm_linear", "prefill"].endswith("; reference until `slicegpt-fast tune`")
    measured.record_passed("NVIDIA H200", "cuda", build_info().revision)
    why = {(row["op"], row["regime"]): row["why"] for row in kernel_table() if row["device"] != "cpu"}
    assert why["norm_linear", "prefill"].endswith("; cuda where aligned, else reference, until `slicegpt-fast tune`")
