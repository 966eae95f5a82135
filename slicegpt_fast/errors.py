"""The one exception that stands for bad input, and what it quotes of others."""


class InputError(ValueError):
    """Something the user can put right: a bad argument, a missing file, an unsupported model.

    The message is one sentence: what was wrong, which argument, what to do. The command line prints it and exits with
    code 2.
    """


def reason(error: BaseException) -> str:
    """The first line of what another exception says, without its full stop; its name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
