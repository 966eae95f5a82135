"""The options of a slice stand in one place, and nothing can be forgotten of them."""

from dataclasses import fields
from typing import get_type_hints

import pytest

from slicegpt_fast import InputError
from slicegpt_fast.slicing import SliceArguments, SliceOptions


def test_the_keyword_arguments_are_the_fields():
    hints = get_type_hints(SliceOptions)
    assert get_type_hints(SliceArguments) == {field.name: hints[field.name] for field in fields(SliceOptions)}
    assert not SliceArguments.__required_keys__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 0.1, "schedule": "steep"}, "schedule must be one of 'uniform', 'variance', not 'steep'"),
        ({"sparsity": 0.1, "schedule": "variance"}, "schedule='variance' spends a budget: give target_params"),
        ({"sparsity": 0.1, "shortcut": "none"}, "shortcut must be one of 'dense', 'aligned', not 'none'"),
        ({"sparsity": 0.1, "shortcut_rank": 3}, "shortcut_rank truncates shortcut='aligned' to a rank of 0 or more"),
        ({"sparsity": 0.1, "round_to": True}, "round_to must be 'auto' or a whole number of at least 1, not True"),
        ({}, "give exactly one of sparsity, target_params and widths"),
    ],
)
def test_what_no_model_can_be_sliced_with(arguments, message):
    with pytest.raises(InputError, match=message):
        SliceOptions(**arguments)
