"""The configuration of a run."""

import dataclasses
from pathlib import Path

import pytest

from ddp_lib import TrainConfig, UserError, run_ranks


def test_a_run_from_before_a_flag_existed_had_its_default():
    earlier = dataclasses.asdict(TrainConfig())
    del earlier["compile"]
    assert TrainConfig().differences(earlier) == []
    assert TrainConfig(compile=True).differences(earlier) == ["compile: False -> True"]


WRONG = {"epochs": [2.5, "3", True], "lr": ["x", None, False], "precision": ["fp8"], "timeout_s": ["9", None]}
WRONG |= {"run_dir": [Path("r"), None], "seed": [None], "compile": [1], "image_size": [32.0]}


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, values in WRONG.items() for v in values])
def test_a_value_of_another_type_is_refused(name, value):
    with pytest.raises(UserError) as refused:
        TrainConfig(**{name: value})
    assert f"--{name.replace('_', '-')} is {value!r}: give" in str(refused.value)
    assert refused.value._render_traceback_() == [f"UserError: {refused.value}"]  # in a notebook, all of it


@pytest.mark.parametrize("arguments", [(2.0,), ("2",), (None,)])
def test_a_number_of_ranks_of_another_type_is_refused(arguments):
    with pytest.raises(UserError, match=r"nproc is .*: give a number of ranks"):
        run_ranks(int, *arguments)
    with pytest.raises(UserError, match=r"timeout_s is .*: give a number of seconds"):
        run_ranks(int, 2, timeout_s=str(arguments[0]))
