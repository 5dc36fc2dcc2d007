"""What an answer may be: a result, or one line."""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from ddp_lib.processes.exit_status import as_exit_status


@contextmanager
def answered(*what: object) -> Iterator[None]:
    """Judges what the block does, and prints: a result, or a UserError that is one line."""
    try:
        with captured() as read, as_exit_status() as outcome, warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    except BaseException as error:
        error.add_note(f"{what}")
        raise
    judge(outcome.status, read()[1], what)


@contextmanager
def captured() -> Iterator[Callable[[], list[str]]]:
    """Gives a function that returns what the block has printed: standard output, and standard error."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]

    def read() -> list[str]:
        for stream in streams:
            stream.flush()
        return [stream.buffer.getvalue().decode() for stream in streams]

    with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
        yield read


def judge(status: int, error: str, what: object) -> None:
    """AssertionError unless this standard error fits to the exit status."""
    lines = error.splitlines()
    if status:
        assert (status in (2, 75), len(lines)) == (True, 1), f"status {status} for {what}:\n{error}"
        assert lines[0].startswith("ddp-launch: error: ") and lines[0].isprintable(), f"{what}:\n{error}"
        assert len(lines[0]) < 400 + 4 * len(str(what)), f"{what}:\n{error}"
    else:
        assert error == "", f"{what}:\n{error}"
