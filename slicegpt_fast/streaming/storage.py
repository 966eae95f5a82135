"""Weights from a checkpoint's files, and what a pass over its layers makes of them in files too.

Models and activations may be larger than memory, and a pass that was killed goes on from the last step it finished:
tensors are written to new files, a state file that is renamed into place names those that count, and only then are the
files they replace deleted.
"""

import json
from collections.abc import Iterator, MutableSequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from slicegpt_fast.slicing.storage import Storage
from slicegpt_fast.streaming.shards import Shards
from slicegpt_fast.unfinished import write_json


class FolderStorage(Storage):
    """Weights from a checkpoint's files, one part at a time; what a pass makes of them in a folder.

    Args:
        folder: of this pass, made if it does not exist.
        shards: the checkpoint.
        kept_on: the device that holds the activations between two uses; None leaves them in their files.
    """

    def __init__(self, folder: Path, shards: Shards, kept_on: torch.device | None) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.shards, self.kept_on = folder, shards, kept_on
        self._state_file = folder / "state.json"
        state = json.loads(self._state_file.read_text()) if self._state_file.exists() else {}
        self.done: int = state.get("done", 0)
        self.finished: bool = state.get("finished", False)
        self._files: dict[str, list[str]] = state.get("files", {})
        self._lists: dict[str, TensorFiles] = {}
        self._states: list[TensorFiles] = []

    def of(self, name: str) -> "FolderStorage":
        return FolderStorage(self.folder / name, self.shards, self.kept_on)

    def check(self, model: PreTrainedModel) -> None:
        """The checkpoint was held against the model when it was opened."""

    def loaded(self, *parts: str) -> AbstractContextManager[None]:
        return self.shards.loaded(*parts)

    def steps(self, number: int) -> Iterator[int]:
        for step in range(self.done, number):
            yield step
            self._finish(step, last=step == number - 1)

    def states(self, name: str) -> "TensorFiles":
        self._states.append(self._open(name, self.kept_on))
        return self._states[-1]

    def tensors(self, name: str) -> "TensorFiles":
        return self._open(name, None)

    def _open(self, name: str, kept_on: torch.device | None) -> "TensorFiles":
        self._lists[name] = TensorFiles(self, name, self._files.get(name, []), kept_on)
        return self._lists[name]

    def _finish(self, step: int, *, last: bool) -> None:
        """Make what the lists hold now the state that a later process starts from."""
        if last:
            for states in self._states:
                states.clear()
        for tensors in self._lists.values():
            tensors.flush()
        self.done, self.finished = step + 1, last
        self._files = {name: tensors.files for name, tensors in self._lists.items()}
        write_json(self._state_file, {"done": self.done, "finished": last, "files": self._files})
        kept = {file for files in self._files.values() for file in files}
        for path in self.folder.glob("*.safetensors"):
            if path.name not in kept:
                path.unlink()


class TensorFiles(MutableSequence[Tensor]):
    """A list of tensors, each in a file of its own, or held on a device until the step's end.

    Attributes:
        files: the names of the tensors' files.
    """

    def __init__(self, storage: FolderStorage, name: str, files: list[str], kept_on: torch.device | None) -> None:
        self.files = list(files)
        self._storage, self._name, self._kept_on = storage, name, kept_on
        self._held: dict[str, Tensor] = {}
        self._unwritten: set[str] = set()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]  # no slices
        file, device = self.files[index], self._storage.shards.device
        if file in self._held:
            return self._held[file].to(device)
        tensor = load_file(self._storage.folder / file)["tensor"]
        if self._kept_on is None:
            return tensor.to(device, copy=True)  # a copy is aligned, whatever the file's header is
        self._held[file] = tensor.to(self._kept_on, copy=True)
        return self._held[file].to(device)

    def __setitem__(self, index: int, tensor: Tensor) -> None:  # type: ignore[override]
        self._forget(self.files[index])
        self.files[index] = self._keep(index % len(self), tensor)

    def __delitem__(self, index: int) -> None:  # type: ignore[override]
        self._forget(self.files.pop(index))

    def insert(self, index: int, tensor: Tensor) -> None:
        self.files.insert(index, self._keep(index, tensor))

    def flush(self) -> None:
        """Write what is only held."""
        for file in self._unwritten:
            self._write(file, self._held[file])
        self._unwritten.clear()

    def _keep(self, index: int, tensor: Tensor) -> str:
        file = f"{self._name}-{index:05}-{self._storage.done:05}.safetensors"  # none that the state file names
        if self._kept_on is None:
            self._write(file, tensor)
        else:
            self._held[file] = tensor.contiguous().to(self._kept_on)
            self._unwritten.add(file)
        return file

    def _write(self, file: str, tensor: Tensor) -> None:
        save_file({"tensor": tensor.contiguous()}, self._storage.folder / file)

    def _forget(self, file: str) -> None:
        self._held.pop(file, None)
        self._unwritten.discard(file)
