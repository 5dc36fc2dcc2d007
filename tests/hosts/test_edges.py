"""A machine that falls silent, whose clock is wrong, or that leaves an elastic job."""

import signal

import pytest

from ddp_lib.run_dir.log import read_events
from tests.lab.clocks import shifted
from tests.lab.damage import SHORT_S
from tests.lab.project import ROOT
from tests.lab.training import TIMEOUT_S, Training, make_images


@pytest.fixture(scope="module")
def images(once):
    return once("faults", lambda folder: make_images(folder / "images")) / "images"


@pytest.mark.parametrize("variables", [False, True], ids=["launcher", "four variables"])
@pytest.mark.parametrize(("how", "who"), [("frozen", 0), ("unplugged", 1)])
def test_a_machine_that_falls_silent_is_named_and_the_others_end(make_lab, images, how, who, variables):
    lab = make_lab(2)
    silent, other = lab.machines[who], lab.machines[1 - who]
    training = Training(lab, images, "--timeout-s", str(SHORT_S), variables=variables)
    programs = training.start(*lab.machines)
    training.until_gate()
    if how == "frozen":
        silent.freeze()
    else:
        silent.cut()
    training.open()
    assert programs[1 - who].wait(TIMEOUT_S) == 75
    last = programs[1 - who].output.splitlines()[-1]
    assert last.startswith("ddp-launch: error: ") and "answer" in last, last
    assert any(name in last for name in (silent.address, silent.name)), last
    assert other.left() == []
    silent.resume()


@pytest.mark.parametrize("nnodes", ["2", "1:2"])
def test_clocks_that_differ_change_nothing(make_lab, images, nnodes):
    lab = make_lab(2)
    training = Training(lab, images, nnodes=nnodes, gate=10**6)
    [first] = training.start(lab.machines[0])
    command = shifted(-900, training.command(lab.machines[1]))
    second = lab.machines[1].start(command, cwd=ROOT, **training.environment)
    training.end(0, [first, second])
    assert "2 rank(s)" in first.output


def test_a_machine_leaves_an_elastic_job_and_the_other_goes_on(make_lab, images):
    lab = make_lab(2)
    m0, m1 = lab.machines
    training = Training(lab, images, nnodes="1:2")
    (first, second) = training.start(m0, m1)
    training.until_gate()
    second.signal(signal.SIGTERM)
    training.open()
    assert second.wait(TIMEOUT_S) == 128 + signal.SIGTERM, second.output
    training.open(size=1)
    assert first.wait(TIMEOUT_S) == 0, first.output
    assert "another machine has left the job: going on without it" in first.output
    worlds = read_events(training.disk(m0)).query("event == 'start' and rank == 0")
    assert list(worlds["world_size"]) == [2, 1]
