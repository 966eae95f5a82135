"""Scores on the tasks of lm-eval, EleutherAI's harness, of models in memory: dense, sliced or patched."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slicegpt_fast.architectures import Decoder, evaluating
from slicegpt_fast.errors import InputError, check_installed, reason

EXTRA, PACKAGES = "tasks", ("lm_eval",)


class Score(NamedTuple):
    """What a model reached in one metric of one task.

    Attributes:
        task, metric: their names in lm-eval.
        value: the score.
        error: its standard error, None where lm-eval gives none.
        higher_is_better: False of a perplexity, for instance.
    """

    task: str
    metric: str
    value: float
    error: float | None
    higher_is_better: bool

    def recovery(self, dense: "Score") -> float | None:
        """The share of the dense model's score that is left, its inverse where lower is better; None of nothing."""
        whole, left = (dense.value, self.value) if self.higher_is_better else (self.value, dense.value)
        return left / whole if whole else None


class Tasks:
    """Tasks of lm-eval, looked up once, to evaluate any number of models on.

    Args:
        names: of tasks, groups or tags, such as "piqa". Their data comes from the hub, or from a local file that the
            task names; how many examples stand in the prompt is the task's own choice.
        folder: with task files (.yaml) of one's own. Python functions that they name are run.
        limit: only the first so many documents of each task.

    Raises:
        InputError: lm-eval is not installed, or there is no such task or folder.
    """

    def __init__(self, names: Sequence[str], *, folder: str | Path | None = None, limit: int | None = None) -> None:
        check_installed(EXTRA, PACKAGES)
        if folder is not None and not Path(folder).is_dir():
            raise InputError(f"{folder} is no folder: give the one that holds the task files (.yaml).")
        self.names, self.limit = list(names), limit
        self._manager = _manager(self.names, folder)
        unknown = [name for name in self.names if name not in self._manager.task_index]
        if unknown or not self.names:
            listed = f"lm-eval knows no task {', '.join(map(repr, unknown))}" if unknown else "no task is named"
            raise InputError(f"{listed}: lm-eval ls tasks lists all, and a folder with task files (.yaml) brings more.")

    def scores(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 1) -> list[Score]:
        """Evaluate a model.

        Args:
            model: a causal language model, dense, sliced or patched; its training mode is left as it was.
            tokenizer: the model's.
            batch_size: sequences at a time.

        Returns:
            The scores, task by task in lm-eval's order, groups included.

        Raises:
            InputError: a task's data cannot be had, or a model of no family that can be sliced.
        """
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        Decoder(model)
        tokenizer = copy.deepcopy(tokenizer)  # which is given a token to pad with
        with evaluating(model):
            try:
                found = lm_eval.simple_evaluate(
                    HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                    tasks=self.names,
                    task_manager=self._manager,
                    limit=self.limit,
                    log_samples=False,
                    random_seed=None,  # the program's own generators stay as they are
                    numpy_random_seed=None,
                    torch_random_seed=None,
                )
            except OSError as error:
                raise InputError(f"the data of {', '.join(self.names)} cannot be had: {reason(error)}.") from error
        return list(_scores(found["results"], found["higher_is_better"]))


def _manager(names: Sequence[str], folder: str | Path | None) -> Any:
    """What knows the tasks: of ``folder`` alone where that is enough, since to list lm-eval's own takes seconds."""
    from lm_eval.tasks import TaskManager

    if folder is not None:
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        if all(name in manager.task_index for name in names):
            return manager
    return TaskManager(include_path=None if folder is None else str(folder))


def _scores(results: Mapping[str, Any], higher_is_better: Mapping[str, Any]) -> Iterator[Score]:
    """What stands in lm-eval's results under "metric,filter", with "metric_stderr,filter" beside it."""
    for task, found in results.items():
        for key, value in found.items():
            metric, comma, variant = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = found.get(f"{metric}_stderr,{variant}")
            name = metric if variant == "none" else f"{metric} ({variant})"
            better = higher_is_better.get(task, {}).get(metric) is not False
            yield Score(task, name, float(value), error if isinstance(error, float) else None, better)
