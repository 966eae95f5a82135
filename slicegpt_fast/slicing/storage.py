"""Where a pass over a model's layers finds their weights and keeps its work: in memory, unless a subclass says else."""

from collections.abc import Iterable, MutableSequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor
from transformers import PreTrainedModel

from slicegpt_fast.errors import InputError


class Storage:
    """Everything in memory: the weights are the model's own, lists are lists, and nothing outlives the process.

    Attributes:
        finished: the pass is done, only its results are still to be had.
    """

    finished = False

    def of(self, name: str) -> "Storage":
        """The storage of one of several passes."""
        return self

    def check(self, model: PreTrainedModel) -> None:
        """Raise InputError unless the weights of ``model`` are to be had."""
        for name, parameter in model.named_parameters():
            if parameter.is_meta:
                raise InputError(
                    f"{name} is on the meta device: load the model with its weights in memory, without offloading."
                )

    def loaded(self, *parts: str) -> AbstractContextManager[None]:
        """Inside, the weights of the model's submodules at these paths are in memory."""
        return nullcontext()

    def steps(self, number: int) -> Iterable[int]:
        """Count the steps of a pass that are left to do, of ``number`` in all."""
        return range(number)

    def states(self, name: str) -> MutableSequence[Tensor]:
        """A list of activations, emptied when the pass is finished."""
        return []

    def tensors(self, name: str) -> MutableSequence[Tensor]:
        """A list of results."""
        return []


IN_MEMORY = Storage()
