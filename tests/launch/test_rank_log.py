"""What a rank's log says about its end."""

from pathlib import Path

import pytest

from ddp_lib.launch.rank_log import NoLogs, last_exception

OWN, TORCH = "/home/me/train.py", "/usr/lib/python3/site-packages/torch/nn.py"


def traceback(*frames: tuple[str, int, str, str], ends: str) -> str:
    lines = [f'  File "{file}", line {line}, in {name}\n    {source}' for file, line, name, source in frames]
    return "\n".join(["Traceback (most recent call last):", *lines, ends, ""])


STEP = (OWN, 41, "step", "loss = net(x)")
MAIN = (OWN, 90, "<module>", "main()")
INSIDE = (TORCH, 7, "forward", "raise")


DURING = "\nDuring handling of the above exception, another exception occurred:\n\n"
WORKER = traceback(MAIN, INSIDE, ends="RuntimeError: Caught ValueError in DataLoader worker process 0.")
CASES = {
    "plain": (traceback(MAIN, STEP, ends="ValueError: bad"), "ValueError: bad", "train.py line 41 in step"),
    "several lines": (traceback(MAIN, STEP, INSIDE, ends="RuntimeError: a\nb"), "RuntimeError: a", "line 41"),
    "output around": (
        f"one\n{traceback(MAIN, ends='KeyError: 1')}two\n",
        "KeyError: 1",
        "line 90 in <module>",
    ),
    "no text": (traceback(MAIN, ends="AssertionError"), "AssertionError", "line 90"),
    "chained": (
        traceback(MAIN, STEP, ends="OSError: first") + DURING + traceback(MAIN, ends="ValueError: second"),
        "ValueError: second",
        "line 90",
    ),
    "a destructor at exit": (
        traceback(MAIN, ends="ValueError: the cause")
        + "Exception ignored in: <function f>\n"
        + traceback(INSIDE, ends="OSError: noise"),
        "ValueError: the cause",
        "line 90",
    ),
    "from a DataLoader's worker": (
        WORKER + "Original " + traceback(INSIDE, STEP, ends="ValueError: bad image"),
        "ValueError: bad image",
        "line 41 in step",
    ),
}


@pytest.mark.parametrize(("text", "line", "where"), CASES.values(), ids=CASES)
def test_the_exception_and_the_innermost_own_line_are_found(text, line, where):
    found = last_exception(text)
    assert found.line == line
    assert where in found.where


@pytest.mark.parametrize(
    "text", ["", "all is well\n", "Traceback (most recent call last):\n", "Segmentation fault"]
)
def test_a_log_without_an_exception_gives_none(text):
    assert last_exception(text) is None


@pytest.mark.parametrize("job", ["a/b", "x" * 300])
def test_a_job_may_have_any_name(job, tmp_path):
    env = {"TORCHELASTIC_RUN_ID": job, "TORCHELASTIC_RESTART_COUNT": "0", "RANK": "0"}
    logs = NoLogs(None, tmp_path)
    assert Path(logs.reify({0: env}).error_files[0]).is_relative_to(logs.root_log_dir)
