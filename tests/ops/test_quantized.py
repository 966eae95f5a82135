"""How weights of 8 and 4 bits are stored."""

import pytest
import torch

from slicegpt_fast.errors import InputError
from slicegpt_fast.ops.quantized import check_quantized, dequantize, group_of, pack, unpack


@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 64), (1, 1), (4, 0)])
def test_packing_is_undone(shape):
    levels = torch.randint(-8, 8, shape, dtype=torch.int8)
    packed = pack(levels)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape[:-1], -(-shape[-1] // 2))
    assert torch.equal(unpack(packed, shape[-1]), levels)


@pytest.mark.parametrize(
    ("width", "count", "group"), [(70, 3, 32), (70, 2, 64), (70, 1, 70), (129, 2, 128), (32, 1, 32)]
)
def test_the_group_follows_from_the_shapes(width, count, group):
    assert group_of(torch.empty(4, count), width) == group


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("width", [31, 33, 100, 257])
def test_dequantize(width, group):
    levels = torch.randint(-8, 8, (5, width), dtype=torch.int8)
    scales = torch.rand(5, -(-width // group), dtype=torch.float16)
    expected = torch.empty(5, width, dtype=torch.float64)
    for i in range(5):
        for j in range(width):
            expected[i, j] = levels[i, j].double() * scales[i, j // group].double()
    assert torch.equal(dequantize(pack(levels), scales, width, torch.float64), expected)
    bytes_ = torch.randint(-127, 128, (5, width), dtype=torch.int8)
    by_row = bytes_.double() * scales[:, :1].double()
    assert torch.equal(dequantize(bytes_, scales[:, :1], width, torch.float64), by_row)


@pytest.mark.parametrize(
    ("dtype", "columns", "scales", "sentence"),
    [
        (torch.int32, 8, torch.ones(2, 1).half(), "is torch.int32; with scales it must be int8"),
        (torch.int8, 7, torch.ones(2, 1).half(), "has 7 columns; for an input of width 8 in 8 bits it must have 8"),
        (torch.uint8, 8, torch.ones(2, 1).half(), "has 8 columns; for an input of width 8 in 4 bits it must have 4"),
        (torch.int8, 8, torch.ones(2, 1), r"argument scales is torch.float32 \[2, 1\]"),
        (torch.int8, 8, torch.ones(3, 1).half(), r"argument scales is torch.float16 \[3, 1\]"),
        (torch.int8, 8, torch.ones(2, 2).half(), "argument scales has 2 columns; of an 8-bit weight it must have 1"),
        (torch.uint8, 4, torch.ones(2, 2).half(), "argument scales has 2 columns; for a width of 8 it must have 1"),
    ],
)
def test_what_does_not_fit_is_refused(dtype, columns, scales, sentence):
    with pytest.raises(InputError, match=sentence):
        check_quantized("weight", torch.zeros(2, columns, dtype=dtype), scales, 8)
