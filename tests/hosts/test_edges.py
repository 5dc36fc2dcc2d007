"""A machine that falls silent, whose clock is wrong, or that leaves an elastic job."""

import signal

import pytest

from ddp_lib.run_dir.log import read_events
from tests.lab.damage import SHORT_S
from tests.lab.training import TIMEOUT_S, Training, make_images

# torch's own view of the time, shifted; all else of the machine keeps the right one.
SHIFTED = """
import datetime, sys
from torch.distributed.elastic.rendezvous import dynamic_rendezvous
from ddp_lib.launch import arrival
true = datetime.datetime
class Shifted(true):
    @classmethod
    def now(cls, zone=None):
        return true.now(zone) + datetime.timedelta(seconds={})
dynamic_rendezvous.datetime = arrival.datetime = Shifted
from ddp_lib.launch.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def images(once):
    return once("faults", lambda folder: make_images(folder / "images")) / "images"


@pytest.mark.parametrize("how", ["frozen", "unplugged"])
@pytest.mark.parametrize("who", [0, 1])
def test_a_machine_that_falls_silent_is_named_and_the_others_end(make_lab, images, how, who):
    lab = make_lab(2)
    silent, other = lab.machines[who], lab.machines[1 - who]
    training = Training(lab, images, "--timeout-s", str(SHORT_S))
    programs = training.start(*lab.machines)
    training.until_gate()
    if how == "frozen":
        for process in silent.processes():
            process.suspend()
    else:
        silent.cut()
    training.open()
    assert programs[1 - who].wait(TIMEOUT_S) == 75
    last = programs[1 - who].output.splitlines()[-1]
    assert last.startswith("ddp-launch: error: ") and "answer" in last, last
    assert ("10.77.0.10" if who == 0 else f"m{who}") in last, last
    assert other.left() == []
    programs[who]._process.send_signal(signal.SIGCONT)  # nsenter stops with its child
    for process in silent.processes():
        process.resume()


@pytest.mark.parametrize("seconds", [-900, 60])
def test_clocks_that_differ_change_nothing(make_lab, images, seconds):
    lab = make_lab(2)
    training = Training(lab, images, gate=10**6)
    [first] = training.start(lab.machines[0])
    command = first.command[1:]
    command[command.index("--run-dir") + 1] = str(training.disk(lab.machines[1]))
    shifted = ["python", "-c", SHIFTED.format(seconds), *command]
    second = lab.machines[1].start(shifted, **training.environment)
    training.end(0, [first, second])
    assert "2 rank(s)" in first.output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_machine_leaves_an_elastic_job_and_the_other_goes_on(make_lab, images, number):
    lab = make_lab(2)
    m0, m1 = lab.machines
    training = Training(lab, images, nnodes="1:2")
    (first, second) = training.start(m0, m1)
    training.until_gate()
    second.signal(number)
    training.open()
    assert second.wait(TIMEOUT_S) == 128 + number, second.output
    training.open(size=1)
    assert first.wait(TIMEOUT_S) == 0, first.output
    assert "another machine has left the job: going on without it" in first.output
    worlds = read_events(training.disk(m0)).query("event == 'start' and rank == 0")
    assert list(worlds["world_size"]) == [2, 1]
