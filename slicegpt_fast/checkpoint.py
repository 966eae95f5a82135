"""Load and save models: dense or sliced, from the hub, a folder or a GGUF file; safetensors only."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from slicegpt_fast import slicing  # noqa: F401  registers the sliced format with transformers
from slicegpt_fast.errors import InputError, reason
from slicegpt_fast.slicing.card import Figure, write_card
from slicegpt_fast.slicing.integration import name_sliced

PROCESS_DIGITS = 9  # what a process id has at most


def load_model(source: str | Path, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a causal language model, dense or sliced, in evaluation mode.

    Args:
        source: a hub id, a local folder, or a GGUF file (its weights are dequantised).
        dtype: of the weights; by default the checkpoint's own (fp32 for GGUF).

    Raises:
        InputError: nothing there, not a causal language model, or a damaged or incomplete checkpoint.
    """
    options: dict[str, Any] = {"dtype": dtype or "auto", "use_safetensors": True, "output_loading_info": True}
    if _is_gguf(source):
        options.update(dtype=dtype or torch.float32, use_safetensors=None)
        if hasattr(transformers, "GgufConfig"):  # releases that would otherwise keep the blocks packed
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model, loading = from_pretrained(AutoModelForCausalLM, source, options)
    missing = sorted(loading["missing_keys"])
    if missing:
        raise InputError(
            f"the checkpoint {source} lacks {len(missing)} tensors ({missing[0]}, ...): write or copy it again."
        )
    return model.eval()


def load_skeleton(source: str | Path) -> PreTrainedModel:
    """The dense model that a config describes, without its weights: on the device "meta".

    Raises:
        InputError: ``source`` holds no config of a causal language model.
    """
    config = from_pretrained(AutoConfig, source, {})
    block = vars(config).pop("quantization_config", None)
    with _loading(source), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if block is not None:
        model.config.quantization_config = block
    return model


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model; ``source`` as in :func:`load_model`.

    Raises:
        InputError: there is none.
    """
    return from_pretrained(AutoTokenizer, source, {})


def save_model(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    also: Callable[[Path], None] = lambda path: None,
    figures: Sequence[Figure] = (),
    text: str | None = None,
) -> None:
    """Write ``model`` (and ``tokenizer``) to a new folder, which appears complete or not at all.

    Args:
        model: dense or sliced.
        folder: does not exist yet, or is empty.
        tokenizer: saved beside the model.
        also: writes what else belongs into the folder, such as a plot; called with its path before it appears.
        figures: what was measured of a sliced model, for the model card in the folder.
        text: what a sliced model was calibrated on, for the model card too.

    Raises:
        InputError: the folder has something in it, or the disk refuses or is too small.
    """

    def write(path: Path) -> None:
        model.save_pretrained(path)
        write_card(path, model, figures, text=text)
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
        also(path)

    name = model.name_or_path
    try:
        write_folder(folder, write, size=model.get_memory_footprint())
        name = str(Path(folder).expanduser().absolute())
    finally:
        name_sliced(model, name)  # not after the temporary folder that it was written to


def write_folder(folder: str | Path, write: Callable[[Path], None], *, size: int = 0) -> None:
    """Let ``write`` fill a folder beside ``folder``, then rename it; on any failure leave nothing behind.

    Args:
        folder: does not exist yet, or is empty.
        write: called with the path of the temporary folder.
        size: bytes that must be free beforehand.

    Raises:
        InputError: as :func:`save_model`.
    """
    folder = Path(folder).expanduser().absolute()
    check_writable(folder)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    for left in folder.parent.glob(f".{escape(folder.name)}.partial-*"):
        if _is_abandoned(left.name.rpartition("-")[2]):
            shutil.rmtree(left, ignore_errors=True)
    try:
        check_space(folder, size)
        partial.mkdir(parents=True)
        write(partial)
        partial.replace(folder)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {folder}: {error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_abandoned(process: str) -> bool:
    """Whether a partial folder of that process was left by one that was killed: none has its id now, or this one."""
    if not process.isdecimal() or len(process) > PROCESS_DIGITS:  # somebody else's folder
        return False
    return int(process) == os.getpid() or not psutil.pid_exists(int(process))


def check_writable(folder: str | Path) -> None:
    """Raise InputError unless ``folder`` is absent or empty, and can be made: called before long work too.

    A temporary folder is made beside it, and removed: permissions alone do not tell.
    """
    folder = Path(folder).expanduser().absolute()
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder} exists and is not an empty folder: choose another place (--out) or remove it.")
        TemporaryDirectory(prefix=".", dir=next(parent for parent in folder.parents if parent.exists())).cleanup()
    except OSError as error:
        raise InputError(f"{folder} cannot be made ({error.strerror}): choose another place (--out).") from error


def check_space(folder: Path, size: int) -> None:
    """Raise InputError unless ``size`` bytes are free on the disk that ``folder`` (absolute) is or will be on."""
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if free < size:
        raise InputError(
            f"{folder} needs up to {size / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free: make room first."
        )


def from_pretrained(loader: Any, source: str | Path, options: dict[str, Any]) -> Any:
    """Call the ``from_pretrained`` of a transformers class; what it raises becomes an InputError."""
    path = _local_path(source)
    if path is not None and path.suffix == ".gguf":
        options["gguf_file"] = path.name
        path = path.parent
    with _loading(source):
        return loader.from_pretrained(str(path or source), **options)


def checkpoint_folder(source: str | Path) -> Path:
    """The folder of a checkpoint in safetensors; one of the hub is downloaded into Hugging Face's cache first.

    Raises:
        InputError: there is no such folder.
    """
    path = _local_path(source)
    if path is None:
        with _loading(source):
            path = Path(snapshot_download(str(source), allow_patterns=["*.json", "model*.safetensors"]))
    if not path.is_dir():
        raise InputError(f"{source} is a single file: give a folder with a safetensors checkpoint, or a hub id.")
    return path


def _local_path(source: str | Path) -> Path | None:
    """The folder or GGUF file that ``source`` names, None for a hub id: one or two plain words that are not there."""
    path = Path(source).expanduser()
    if not str(source):
        raise InputError("the model's name is empty: give a hub id, a local folder or a GGUF file.")
    if path.exists():
        return path
    if _is_gguf(source) or path.is_absolute() or len(path.parts) > 2 or str(source)[0] in ".~":
        raise InputError(f"{source} does not exist: give a hub id, a local folder or a GGUF file.")
    return None


def _is_gguf(source: str | Path) -> bool:
    return Path(source).suffix == ".gguf"


@contextmanager
def _loading(source: str | Path) -> Iterator[None]:
    """Turns what the libraries raise about a bad checkpoint into an InputError."""
    try:
        yield
    except InputError:
        raise
    except StrictDataclassError as error:  # a config with a value of the wrong type; its cause says it in one line
        raise InputError(f"cannot load {source}: {reason(error.__cause__ or error)}.") from error
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, SafetensorError) as error:
        raise InputError(f"cannot load {source}: {reason(error)}.") from error
