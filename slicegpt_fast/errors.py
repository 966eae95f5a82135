"""The one exception that stands for bad input, and what it quotes of others."""

from collections.abc import Iterable
from importlib.util import find_spec
from numbers import Integral
from typing import TypeGuard, get_args


class InputError(ValueError):
    """Something the user can put right: a bad argument, a missing file, an unsupported model.

    The message is one sentence: what was wrong, which argument, what to do. The command line prints it and exits with
    code 2.
    """


def reason(error: BaseException) -> str:
    """The first line of what another exception says, without its full stop; its name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def check_choice(name: str, value: str, choices: object) -> None:
    """Raise InputError unless ``value`` is one of a Literal's ``choices``."""
    if value not in get_args(choices):
        raise InputError(f"{name} must be one of {', '.join(map(repr, get_args(choices)))}, not {value!r}.")


def check_installed(extra: str, packages: Iterable[str]) -> None:
    """Raise InputError unless all packages of an extra are installed; nothing of them is imported."""
    missing = next((name for name in packages if find_spec(name) is None), None)
    if missing is not None:
        raise InputError(f"the package {missing} is not installed: pip install 'slicegpt-fast[{extra}]' brings it.")


def is_whole(number: object) -> TypeGuard[int]:
    """Return whether a number is an integer, of Python or of numpy; true and false are not."""
    return isinstance(number, Integral) and not isinstance(number, bool)
