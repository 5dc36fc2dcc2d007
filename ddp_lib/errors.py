"""UserError: a mistake that the reader can correct."""


class UserError(Exception):
    """A problem that the reader can solve. Its text is one line that names the value and the cure.

    Entry points print that line without a traceback and exit with status 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of another library's exception, cut to 160 characters; its type if it is empty."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
