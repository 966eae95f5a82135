"""Backend choice: call over context over environment, and the table behind ``auto``."""

import pytest
import torch

from slicegpt_fast.errors import InputError
from slicegpt_fast.kernels import measured
from slicegpt_fast.ops import use_backend
from slicegpt_fast.ops.dispatch import OPS, Backend, Request

H200 = (9, 0)


@pytest.fixture
def op(monkeypatch):
    """covariance_ with backends that only record that they ran."""
    op = OPS["covariance_"]
    ran = []
    fakes = {
        name: Backend(lambda *_, name=name: ran.append(name), lambda request: None)
        for name in ("reference", "cpu", "cuda")
    }
    monkeypatch.setattr(op, "backends", fakes)
    monkeypatch.setattr(op, "_plans", {})
    monkeypatch.delenv("SLICEGPT_FAST_BACKEND", raising=False)
    op.ran = ran
    return op


def run(op, backend="auto"):
    op(torch.zeros(2, 2), torch.zeros(3, 2), None, None, backend=backend)
    return op.ran[-1]


def test_call_beats_context_beats_environment(op, monkeypatch):
    assert run(op) == "cpu"
    monkeypatch.setenv("SLICEGPT_FAST_BACKEND", "reference")
    assert run(op) == "reference"
    with use_backend("cuda"):
        assert run(op) == "cuda"
        assert run(op, backend="cpu") == "cpu"
    assert run(op) == "reference"


def test_unknown_names(op, monkeypatch):
    with pytest.raises(InputError, match="argument backend is 'gpu'"), use_backend("gpu"):
        pass
    monkeypatch.setenv("SLICEGPT_FAST_BACKEND", "gpu")
    with pytest.raises(InputError, match="SLICEGPT_FAST_BACKEND is 'gpu'"):
        run(op)


def test_backend_that_cannot_run_says_why(op):
    with pytest.raises(InputError, match="backend 'triton' cannot run covariance_: it is not part"):
        run(op, "triton")
    op.backends["cuda"] = Backend(print, lambda request: "no such GPU")
    with pytest.raises(InputError, match="no such GPU"):
        run(op, "cuda")


def test_auto_skips_a_backend_that_refuses(op):
    op.backends["cpu"] = Backend(print, lambda request: "not today")
    assert run(op) == "reference"


@pytest.mark.parametrize(
    "op_name", sorted(op.name for op in OPS.values() if any(rule.by_measurement for rule in op.rules))
)
@pytest.mark.parametrize(
    ("capability", "operand", "backend"),
    [
        ((8, 0), torch.bfloat16, "triton"),
        ((9, 0), torch.float16, "triton"),
        ((9, 0), torch.float32, "reference"),
        ((10, 0), torch.float32, "reference"),
        ((7, 5), torch.float16, "reference"),
    ],
)
def test_auto_on_cuda(op_name, capability, operand, backend, monkeypatch):
    """Where everything was measured and Triton has won."""
    monkeypatch.setattr(Request, "capability", property(lambda self: capability))
    monkeypatch.setattr(measured, "gpu_name", lambda device: "a GPU")
    monkeypatch.setattr(measured, "lookup", lambda *key: measured.Entry({"reference": 2.0, "triton": 1.0}))
    for regime in {rule.regime for rule in OPS[op_name].rules}:
        request = Request(op_name, torch.device("cuda"), operand, regime, (64, 64, 64))
        assert OPS[op_name].choose("auto", request) == backend


def test_fp32_is_refused_where_triton_would_round_it(monkeypatch):
    monkeypatch.setattr(Request, "capability", property(lambda self: (10, 0)))
    request = Request("covariance_", torch.device("cuda"), torch.float32, "tall", (64, 64, 64))
    with pytest.raises(InputError, match="tf32"):
        OPS["covariance_"].choose("triton", request)


def test_gradients_flow_through_the_reference(device):
    x = torch.randn(4, 3, device=device, requires_grad=True)
    acc = torch.zeros(3, 3, dtype=torch.float64, device=device)
    OPS["covariance_"](acc, x, None, None, backend="triton")
    acc.sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach().sum(1, keepdim=True).expand(4, 3))
