"""An op that is added by the list in CONTRIBUTING.md, and by nothing else, is dispatched, tuned and listed."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from slicegpt_fast.errors import InputError
from slicegpt_fast.kernels import measured
from slicegpt_fast.ops import dispatch, kernel_table, tuning
from slicegpt_fast.ops.backends import cpu
from slicegpt_fast.ops.dispatch import OPS, Op, Request, Rule, check_matrix, require
from slicegpt_fast.ops.tuning import Shape, tune

ran = []


# slicegpt_fast/ops/row_product.py
def reference(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(1)


def check(x: Tensor, y: Tensor) -> None:
    check_matrix("x", x)
    check_matrix("y", y, x.dtype, x.device)
    require(x.shape == y.shape, f"argument y has shape {list(y.shape)}; like x it must have {list(x.shape)}.")


def request(x: Tensor, y: Tensor) -> Request:
    return Request("row_product", x.device, x.dtype, "tall", (x.shape[0], x.shape[1], x.shape[1]))


def operands(request: Request) -> tuple[Tensor, Tensor]:
    M, width, _ = request.shape
    return request.random(M, width), request.random(M, width)


def row_product_op() -> Op:
    return Op(
        "row_product",
        "(Tensor x, Tensor y, str backend) -> Tensor",
        reference=reference,
        check=check,
        request=request,
        fake=lambda x, y: x.new_empty(x.shape[0]),
        operands=operands,
        regime=lambda rows: "tall",
        epilogues=(None,),
        rules=(
            Rule("cuda", (8, 0), (), "tall", ("triton",), "one pass"),
            Rule("cpu", (0, 0), (torch.float32,), "tall", ("cpu",), "one pass"),
        ),
    )


# slicegpt_fast/ops/backends/cpu.py
def row_product(x: Tensor, y: Tensor) -> Tensor:
    ran.append("cpu")
    return torch.einsum("ij,ij->i", x, y)


@contextmanager
def added() -> Iterator[Op]:
    """The op for a while, registered in a library of its own that takes it away again."""
    with torch.library._scoped_library("slicegpt_fast", "FRAGMENT") as library, pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "LIBRARY", library)
        try:
            op = row_product_op()
            op.add_backend("cpu", row_product, cpu.refuses)
            yield op
        finally:
            OPS.pop("row_product", None)


@pytest.fixture
def op() -> Iterator[Op]:
    ran.clear()
    with added() as op:
        yield op


def pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)


def test_it_is_dispatched(op):
    x, y = pair(5, 3)
    exact = (x.double() * y.double()).sum(1).float()
    for backend, expected in (("auto", ["cpu"]), ("cpu", ["cpu"]), ("reference", [])):
        ran.clear()
        torch.testing.assert_close(op(x, y, backend=backend), exact)
        assert ran == expected
    ran.clear()
    op(*pair(5, 3, dtype=torch.bfloat16), backend="auto")
    assert ran == []  # no rule takes it
    with pytest.raises(InputError, match="backend 'cuda' cannot run row_product: it is not part of this installation"):
        op(x, y, backend="cuda")
    with pytest.raises(InputError, match=r"argument y has shape \[3, 5\]; like x it must have \[5, 3\]\."):
        op(x, y.T, backend="auto")


@pytest.mark.parametrize("shape", [(0, 3), (5, 0)], ids=str)
def test_the_reference_runs_what_is_empty(shape, op):
    assert torch.equal(op(*pair(*shape), backend="cpu"), torch.zeros(shape[0]))
    assert ran == []


def test_its_operands_ask_for_what_they_were_made_for(op):
    asked = Request("row_product", torch.device("cpu"), torch.float32, "tall", (5, 3, 3))
    assert op.request(*op.operands(asked)) == asked


def test_its_fake_stands_for_it(op):
    x, y = pair(5, 3)
    with torch._subclasses.FakeTensorMode() as mode:
        assert op(mode.from_tensor(x), mode.from_tensor(y), backend="auto").shape == (5,)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is tuned here is the CPU")
def test_it_is_tuned_and_listed(op, cache, monkeypatch):
    monkeypatch.setattr(tuning, "current_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(tuning, "microseconds", lambda call: float(len(ran)))
    (shape,) = (shape for shape in tuning.stream_shapes(3, 5) if shape.op == "row_product")
    assert shape == Shape("row_product", 5, 3, 3)
    ((_, us),) = tune([shape], torch.float32)
    assert us.keys() == {"reference", "cpu"}
    assert measured.lookup("cpu", "row_product", measured.bucket(torch.float32, (5, 3, 3), None)).us == us
    rows = [row for row in kernel_table() if row["op"] == "row_product"]
    assert [(row["device"], row["dtypes"], row["backend"]) for row in rows] == [
        ("cuda >= 8.0", "any", "fastest of triton, reference"),
        ("cpu", "float32", "cpu"),
    ]


def test_nothing_of_it_stays():
    for _ in range(2):  # what stayed would be in the way
        with added():
            assert "row_product" in OPS
            assert hasattr(torch.ops.slicegpt_fast, "row_product")
        assert "row_product" not in OPS
        assert not hasattr(torch.ops.slicegpt_fast, "row_product")
    assert "row_product" not in {row["op"] for row in kernel_table()}
