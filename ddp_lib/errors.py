"""The one kind of error that is the reader's to cure."""


class UserError(Exception):
    """A problem that the reader can cure. Its text is one line that names the value and the cure.

    Entry points print that line without a traceback and exit with status 2.
    """


def first_line(error: BaseException) -> str:
    """What an exception of another library says, short enough for a line of ours."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
