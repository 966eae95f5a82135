"""What a teacher predicts, on disk: so that it and the model that learns from it need not be in memory together.

    batch-00000.safetensors    tokens [N, K] int32, log_probabilities [N, K] fp16    N = B T positions of the batch

384 bytes a position at K = 64. A file appears complete or not at all; those that are there are not made again.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from slicegpt_fast.architectures import evaluating
from slicegpt_fast.errors import InputError
from slicegpt_fast.evaluation import perplexity
from slicegpt_fast.recovery.loss import ROWS, head_alone, run_base
from slicegpt_fast.unfinished import write_json, write_tensors

KEPT = 64  # tokens at each position
BYTES = 6 * KEPT  # on disk for each


class Lessons:
    """The teacher's predictions for a sequence of batches, in a folder."""

    def __init__(self, folder: Path, batches: Sequence[dict[str, Tensor]]) -> None:
        self._folder, self._batches = folder, batches

    def teacher(
        self,
        teacher: PreTrainedModel | Callable[[], PreTrainedModel],
        held_out: Sequence[dict[str, Tensor]],
        vocabulary: int,
        *,
        progress: bool,
    ) -> float:
        """Let a teacher make what is missing; return its perplexity on held-out text.

        Raises:
            InputError: its vocabulary has another size.
        """
        told = self._folder / "teacher.json"
        if not told.exists():
            model = teacher if isinstance(teacher, PreTrainedModel) else teacher()
            if model.config.vocab_size != vocabulary:
                raise InputError(
                    f"the teacher's vocabulary has {model.config.vocab_size} tokens, the model's {vocabulary}: give "
                    "the dense model that it was sliced from."
                )
            self._write(model, progress=progress)
            write_json(told, perplexity(model, held_out))
        return float(json.loads(told.read_text()))

    @torch.inference_mode()
    def _write(self, teacher: PreTrainedModel, *, progress: bool) -> None:
        missing = [index for index in range(len(self._batches)) if not self._file(index).exists()]
        with evaluating(teacher):
            for index in tqdm(missing, desc="teacher", unit="batch", disable=not progress):
                batch = {name: each.to(teacher.device) for name, each in self._batches[index].items()}
                states, kind = run_base(teacher, batch)
                found = []
                for hidden in states.split(ROWS):
                    with head_alone(teacher, kind, hidden) as logits:
                        found.append(logits.float().log_softmax(-1).topk(min(KEPT, logits.shape[-1])))
                log_probabilities, tokens = (torch.cat(each) for each in zip(*found, strict=True))
                told = {"tokens": tokens.int().cpu(), "log_probabilities": log_probabilities.half().cpu()}
                write_tensors(self._file(index), told)

    def of(self, step: int, device: torch.device) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Return the batch of a step, its tokens [N, K] int64 and log-probabilities [N, K] fp16."""
        index = step % len(self._batches)
        batch = {name: each.to(device) for name, each in self._batches[index].items()}
        found = load_file(self._file(index))
        return batch, found["tokens"].to(device).long(), found["log_probabilities"].to(device)

    def _file(self, index: int) -> Path:
        return self._folder / f"batch-{index:05}.safetensors"
