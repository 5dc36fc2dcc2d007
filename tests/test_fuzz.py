"""Whatever comes in, the answer is a result or one line: cases drawn at random, the same at every run.

FUZZ_SEED=7 FUZZ_TIMES=50 pytest tests/test_fuzz.py draws others, and 50 times as many.
"""

import os
from pathlib import Path

import pytest

from tests.lab.fuzz import try_case

SEED, TIMES = (int(os.environ.get(name, "1")) for name in ("FUZZ_SEED", "FUZZ_TIMES"))
IN_THIS_PROCESS = {"command": 300, "rank": 400, "images": 100, "model": 60, "run folder": 4}


def try_cases(kind: str, count: int, folder: Path) -> None:
    for number in range(count * TIMES):
        try_case(kind, SEED, number, folder)


@pytest.mark.parametrize(("kind", "count"), IN_THIS_PROCESS.items(), ids=IN_THIS_PROCESS)
def test_the_answer_is_a_result_or_one_line(kind, count, tmp_path):
    try_cases(kind, count, tmp_path)


@pytest.mark.ranks
def test_so_it_is_with_real_ranks(tmp_path):
    try_cases("start", 2, tmp_path)
