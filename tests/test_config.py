"""The configuration of a run."""

import dataclasses

from ddp_lib import TrainConfig


def test_a_run_from_before_a_flag_existed_had_its_default():
    earlier = dataclasses.asdict(TrainConfig())
    del earlier["compile"]
    assert TrainConfig().differences(earlier) == []
    assert TrainConfig(compile=True).differences(earlier) == ["compile: False -> True"]
