"""The one exception that stands for bad input."""


class InputError(ValueError):
    """Something the user can put right: a bad argument, a missing file, an unsupported model.

    The message is one sentence: what was wrong, which argument, what to do. The command line prints it and exits with
    code 2.
    """
