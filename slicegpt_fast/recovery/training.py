"""One run of training: what is trained, the optimiser's step, and a state on disk from which it goes on exactly."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from slicegpt_fast.recovery.loss import summed_divergence
from slicegpt_fast.slicing.batches import pieces
from slicegpt_fast.unfinished import write_tensors

WARM_UP = 0.05  # of the steps, with a rising learning rate
LAST = 0.1  # of the learning rate, at the end of its cosine
BETAS = (0.9, 0.95)
TOLD = ("tokens", "log_probabilities")  # what the teacher tells of a batch
LONGEST = 1.0  # norm of a step's gradient


@dataclass(frozen=True)
class Point:
    """What was measured after a number of steps.

    Attributes:
        step: how many steps were done.
        loss: the mean divergence from the teacher since the point before, in nats per token; at step 0 not a number.
        perplexity: on held-out text.
    """

    step: int
    loss: float
    perplexity: float


class Diverged(Exception):
    """The loss or its gradient is no longer a finite number."""


class Training:
    """Trains parameters of a model on its teacher's predictions.

    Attributes:
        parameters: what is trained, by name.
        done: how many steps were taken.
        points: what was measured so far.
    """

    def __init__(
        self, model: PreTrainedModel, parameters: dict[str, nn.Parameter], steps: int, learning_rate: float
    ) -> None:
        self.parameters, self.done = parameters, 0
        self.points: list[Point] = []
        self._model, self._steps, self._learning_rate = model, steps, learning_rate
        self._optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate, betas=BETAS, weight_decay=0.0)

    def step(self, batch: dict[str, Tensor], tokens: Tensor, log_probabilities: Tensor) -> float:
        """Learn from a batch; return its mean divergence in nats per token.

        Raises:
            Diverged: and the parameters are as before.
        """
        self._optimizer.zero_grad(set_to_none=True)
        counted = int(batch["attention_mask"].sum())
        loss = 0.0
        told = [each.unflatten(0, batch["input_ids"].shape) for each in (tokens, log_probabilities)]
        for piece in pieces(batch | dict(zip(TOLD, told, strict=True))):
            lesson = [piece.pop(name).flatten(0, 1) for name in TOLD]
            divergence = summed_divergence(self._model, piece, *lesson) / counted
            divergence.backward()
            loss += divergence.item()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), LONGEST)
        if not (math.isfinite(loss) and norm.isfinite()):
            raise Diverged
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate * self._share()
        self._optimizer.step()
        self.done += 1
        return loss

    def _share(self) -> float:
        """The share of the learning rate that the next step is taken with."""
        rising = (self.done + 1) / max(1.0, WARM_UP * self._steps)
        falling = 0.5 * (1 + math.cos(math.pi * self.done / self._steps))
        return min(1.0, rising) * (LAST + (1 - LAST) * falling)

    def best(self) -> Point:
        """The point of the lowest perplexity."""
        return min(self.points, key=lambda point: point.perplexity if math.isfinite(point.perplexity) else math.inf)

    def stale(self, patience: int) -> bool:
        """Whether the best point has that many points behind it."""
        return self.points[-patience:].count(self.best()) == 0

    def save(self, folder: Path) -> None:
        """Write all that the next steps depend on; and the parameters by themselves, if they are the best so far."""
        state = {f"{name}.{key}": value for name, key, value in self._moments()}
        state |= {name: parameter.detach() for name, parameter in self.parameters.items()}
        points = [vars(point) for point in self.points]
        write_tensors(folder / "training.safetensors", state, {"done": str(self.done), "points": json.dumps(points)})
        if self.best() is self.points[-1]:
            write_tensors(folder / "best.safetensors", {name: each.detach() for name, each in self.parameters.items()})

    def load(self, folder: Path) -> bool:
        """Go on from what :meth:`save` wrote, if there is anything; return whether there was."""
        file = folder / "training.safetensors"
        if not file.exists():
            return False
        with safe_open(file, "pt") as stored, torch.no_grad():
            told = stored.metadata()
            self.done = int(told["done"])
            self.points = [Point(**point) for point in json.loads(told["points"])]
            names = set(stored.keys())
            for name, parameter in self.parameters.items():
                parameter.copy_(stored.get_tensor(name))
                if f"{name}.exp_avg" in names:
                    moments = {key: stored.get_tensor(f"{name}.{key}") for key in ("step", "exp_avg", "exp_avg_sq")}
                    at = {key: moments[key].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
                    self._optimizer.state[parameter] = {"step": moments["step"], **at}
        return True

    @torch.no_grad()
    def load_best(self, folder: Path) -> None:
        """Give the parameters the values that they had at the best point."""
        with safe_open(folder / "best.safetensors", "pt") as stored:
            for name, parameter in self.parameters.items():
                parameter.copy_(stored.get_tensor(name))

    def _moments(self) -> Iterator[tuple[str, str, Tensor]]:
        for name, parameter in self.parameters.items():
            state: dict[str, Any] = self._optimizer.state.get(parameter, {})
            for key, value in state.items():
                yield name, key, value
