"""The one exception that stands for bad input, and what it quotes of others."""

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


def is_whole(number: object) -> TypeGuard[int]:
    """Return whether a number is an integer, of Python or of numpy; true and false are not."""
    return isinstance(number, Integral) and not isinstance(number, bool)
