"""What a check prints below an answer, and how many were right."""

import pytest

from ddp_lib.course import cells
from ddp_lib.course.cells import exercise, right_so_far
from ddp_lib.notebook.errors import RankError, hang_error


def answer(value):
    return float(value)


def raised(error: Exception):
    raise error


HERE = "test_cells.py line 11 in answer"
OWN = ["line 9 in on_a_rank: answer()", "line 2 in answer: dist.al()", "line 20 in count: usual()"]
LOST = "rank 1: RuntimeError: [/b/pair.cc:561] Connection reset by peer [127.0.0.1]:39065. GLHF!"
HANG = hang_error({0: None, 1: None}, 30)

CASES = {
    "right": (lambda f: f("1") == 1, "1: right"),
    "wrong": (lambda f: f("1") == 2, "1: not yet"),
    "a hint": (lambda f: f("1") == 2 or "too small", "1: not yet: too small"),
    "own exception": (
        lambda f: f("x"),
        f"1: not yet: ValueError: could not convert string to float: 'x', {HERE}:",
    ),
    "of a rank": (
        lambda f: raised(RankError(1, "rank 1: NameError: a\n b", lines=OWN)),
        "1: not yet: rank 1: NameError: a b, line 2 in answer: dist.al()",
    ),
    "elsewhere": (
        lambda f: raised(RankError(0, LOST, lines=OWN[:1])),
        "1: not yet: Connection closed by peer, line 9 in on_a_rank: answer()",
    ),
    "a hang": (lambda f: raised(HANG), f"1: not yet: {HANG}"),
    "without a message": (
        lambda f: raised(AssertionError()),
        "1: not yet: AssertionError, test_cells.py line 15",
    ),
}


@pytest.mark.parametrize(("check", "printed"), CASES.values(), ids=CASES)
def test_a_check_prints_a_hint_or_the_error_and_the_answers_line(check, printed, capsys):
    check.__name__ = "check_1"
    exercise(check)(answer)
    out = capsys.readouterr().out
    assert out.startswith(printed)
    assert out.count("\n") == printed.count("\n") + 1


def test_the_last_result_of_each_exercise_counts(capsys, monkeypatch):
    monkeypatch.setattr(cells, "_right", {})

    def checks(number: int, *results: bool):
        def check(answer):
            return answer

        check.__name__ = f"check_{number}"
        for result in results:
            exercise(check)(result)

    right_so_far(of=3)
    checks(1, False, True)
    checks(2, True, False)
    right_so_far(of=3)
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0], lines[-1]) == ("0 of 3 right", "1 of 3 right")
