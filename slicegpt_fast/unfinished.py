"""Long work that goes on where it was killed: its folder, and the record of what the result depends on."""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from slicegpt_fast.checkpoint import check_space
from slicegpt_fast.errors import InputError

Settings = dict[str, object]  # of a run, by name, as JSON has them


def work_folder(folder: str | Path) -> Path:
    """Return where unfinished work for the result ``folder`` is kept; it exists where a run was killed."""
    folder = Path(folder).expanduser().absolute()
    return folder.with_name(f".{folder.name}.unfinished")


@contextmanager
def hold(work: Path, settings: Settings, size: int) -> Iterator[None]:
    """Hold the folder of an unfinished run, new or of the same settings.

    On success it is deleted. On bad input too, but for the work of an earlier run.

    Args:
        work: the folder.
        settings: all that the result depends on.
        size: bytes that must be free for a new run.

    Raises:
        InputError: the folder is another run's or in use, or the disk refuses or is too small.
    """
    record = work / "settings.json"
    resumed = record.exists()
    if resumed:
        _compare(json.loads(record.read_text()), settings, work)
    else:
        shutil.rmtree(work, ignore_errors=True)  # without its record, it is what a killed deletion left
        check_space(work, size)
        work.mkdir(parents=True)
        write_json(record, settings)
    with record.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is working in {work}: wait for it or end it.") from None
        try:
            yield
        except InputError:
            if not resumed:
                shutil.rmtree(work)
            raise
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"the work stopped ({error}): put that right, the same command goes on from {work}."
            ) from error
        shutil.rmtree(work)


def _compare(there: Settings, here: Settings, work: Path) -> None:
    """Raise InputError unless the settings of an unfinished run are those of this one."""
    differing = []
    for name in there | here:
        values = f" ({there.get(name)} there, {here.get(name)} now)"
        if there.get(name) != here.get(name):
            differing.append(name + (values if len(values) < 64 else ""))  # hashes say nothing to a reader
    if differing:
        raise InputError(
            f"{work} holds an unfinished run that differs in {', '.join(differing)}: repeat its command to go on, or "
            "delete the folder to start anew."
        )


def digest_of(batches: Iterable[Mapping[str, Tensor]]) -> str:
    """Return the sha256 of batches of integers."""
    text = hashlib.sha256()
    for batch in batches:
        for tensor in batch.values():
            text.update(str(tensor.shape).encode() + tensor.cpu().long().numpy().tobytes())
    return text.hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, which appears complete or not at all."""
    beside = path.with_name(f"{path.name}.partial")
    beside.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    beside.replace(path)


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, which appears complete or not at all."""
    beside = file.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside, metadata)
    beside.replace(file)
