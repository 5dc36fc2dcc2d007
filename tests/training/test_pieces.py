"""Pieces of the training that a script of one's own takes: metrics, the check of the replicas, the log."""

import math

import pytest
import torch

from ddp_lib import Metrics, RankError, RunLog, World, check_replicas, read_run, run_ranks, warm_up, wrap
from ddp_lib.errors import UserError
from ddp_lib.run_dir.log import read_events
from ddp_lib.training.ddp import weights_sha256
from ddp_lib.training.evaluate import evaluate
from tests.lab.runs import TIMEOUT_S


def means_of_unequal_ranks() -> dict:
    """Rank 0 has three samples, rank 1 one, rank 2 none."""
    samples = ([1.0, 2.0, 3.0], [10.0], [])
    with World.join() as world:
        metrics = Metrics(world, "value", "nothing")
        for value in samples[world.rank]:
            metrics.add("value", torch.tensor(value), 1)
        first = metrics.means()
        return {"first": first, "again": metrics.means()}


@pytest.mark.ranks
def test_means_weigh_samples_not_ranks():
    for got in run_ranks(means_of_unequal_ranks, 3, timeout_s=TIMEOUT_S):
        assert got["first"]["value"] == 4.0  # the mean of the ranks' means would be 6
        assert math.isnan(got["first"]["nothing"]) and math.isnan(got["again"]["value"])


def drift(rank: int) -> None:
    """One bit of one parameter changes on `rank`, beside the gradients."""
    with World.join() as world:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 2)
        check_replicas(model, world)
        if world.rank == rank:
            model.weight.data.view(torch.int32)[0, 0] ^= 1
        check_replicas(model, world)


@pytest.mark.ranks
def test_a_replica_that_has_drifted_is_named():
    with pytest.raises(RankError, match=r"parameters of rank\(s\) 1 differ from rank 0's"):
        run_ranks(drift, 3, 1, timeout_s=TIMEOUT_S)


KINDS = (torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.float8_e4m3fn)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_digest_is_of_any_type_and_of_buffers_if_asked(kind):
    model = torch.nn.Sequential(torch.nn.Module(), torch.nn.BatchNorm1d(2))
    model[0].scale = torch.nn.Parameter(torch.ones(()).to(kind))
    model[0].grid = torch.nn.Parameter(torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last).to(kind))
    model[0].empty = torch.nn.Parameter(torch.zeros(0, 3).to(kind))

    def digests() -> list[str]:
        return weights_sha256(model, World()) + weights_sha256(model, World(), buffers=True)

    plain, both = digests()
    assert plain != both
    model[1].running_mean[0] = 1
    assert digests()[0] == plain and digests()[1] != both
    model[0].scale.data = torch.zeros(()).to(kind)
    assert digests()[0] != plain


def test_warming_up_leaves_parameters_and_buffers_as_they_were():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    warm_up(wrap(model, World()), torch.ones(3, 4))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("part", [0, 1])
def test_a_model_on_another_device_is_refused_in_one_line(part):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    model[part].to("meta")
    world = World(device=torch.device("cpu"), world_size=2)
    line = r"the model is on meta, but this rank computes on cpu: move it there first"
    for call in (wrap, lambda model, world: evaluate(model, None, world)):
        with pytest.raises(UserError, match=line):
            call(model, world)


def test_the_log_of_a_script_is_read_as_the_trainings(tmp_path):
    with RunLog(tmp_path) as log:
        log.start(step=0, **World().describe())
        for step in range(4):
            log.step(step // 2, step, samples=8, loss=1.0 / (step + 1), data_s=0.0)
        log.epoch(1, 4, test_accuracy=0.5)
        log.end(4, "finished")
    with RunLog(tmp_path) as log:  # resumed at step 2
        log.start(step=2, **World().describe())
        log.step(1, 2, samples=8, loss=9.0, lr=0.1)
    table = read_run(tmp_path)
    assert list(table["step"]) == [0, 1, 2, 3] and table["loss"][2] == 9.0
    assert (table["step_s"] > 0).all() and math.isnan(table["lr"][0])
    assert list(read_events(tmp_path)["event"]) == ["start", "epoch", "end", "start"]
