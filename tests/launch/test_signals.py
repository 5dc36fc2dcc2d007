"""Signals to ddp-launch: they reach the ranks, and no rank stays behind."""

import os
import shlex
import signal
import socket
import subprocess
import time
from pathlib import Path

import pexpect
import psutil
import pytest
import torch

from ddp_lib.processes.signals import AGAIN_S
from tests.lab.agent import ranks
from tests.lab.processes import (
    TIMEOUT_S,
    TRAIN,
    all_gone,
    clean_environment,
    end,
    first_line,
    wait_until,
)

WAITS = """
with StopSignal() as stop:
    stop.deferred = True
    note("pid", str(os.getpid()))
    while not stop.requested:
        time.sleep(0.02)
"""

LEAVES = f"""{WAITS}
    note("left", str(stop.requested))
    sys.exit(128 + stop.requested)
"""

# Has just done its work, as in a training's last test.
DONE = f"""{WAITS}
    time.sleep(0.3)
    note("left", str(stop.requested))
"""

DEAF = """
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: note("heard"))
note("pid", str(os.getpid()))
for_ever()
"""


@pytest.mark.ranks
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_the_ranks_and_they_leave_in_order(no_nohup, start, tmp_path, number):
    process = start(LEAVES, "--nproc-per-node=2")
    both = ranks(tmp_path)
    process.send_signal(number)
    status, _, err = end(process)
    assert (status, err) == (128 + number, [])
    assert [(tmp_path / f"left{rank}").read_text() for rank in range(2)] == [str(int(number))] * 2
    assert all_gone(both)


@pytest.mark.ranks
def test_all_processes_get_it_and_the_ranks_finish(start, tmp_path):
    """As SLURM, systemd and `timeout` stop a job: the fork server gets the signal too."""
    process = start(DONE, "--nproc-per-node=2")
    both = ranks(tmp_path)
    for each in psutil.Process(process.pid).children(recursive=True):
        each.terminate()
    process.terminate()
    _, err = process.communicate(timeout=15)  # half of --grace-s
    assert (process.returncode, err) == (143, "")
    assert [(tmp_path / f"left{rank}").read_text() for rank in range(2)] == ["15", "15"]
    assert all_gone(both)


@pytest.mark.ranks
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ranks_that_ignore_it_are_ended(start, tmp_path, number):
    process = start(DEAF, "--nproc-per-node=2", "--grace-s=2")
    both = ranks(tmp_path)
    process.send_signal(number)
    _, err = process.communicate(timeout=15)  # torch's own limit is 30 s
    assert (process.returncode, err) == (128 + number, "")
    assert all((tmp_path / f"heard{rank}").exists() for rank in range(2))
    assert all_gone(both)


@pytest.mark.ranks
def test_a_second_ctrl_c_ends_all_at_once(start, tmp_path):
    process = start(DEAF, "--nproc-per-node=2", "--grace-s=1000")
    both = ranks(tmp_path)
    process.send_signal(signal.SIGINT)
    wait_until(lambda: all((tmp_path / f"heard{rank}").exists() for rank in range(2)))
    time.sleep(AGAIN_S)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=15)
    assert (process.returncode, err) == (130, "")
    assert all_gone(both)


@pytest.mark.ranks
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_machines_have_joined(started, number):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = f"127.0.0.1:{silent.getsockname()[1]}"
        process = subprocess.Popen(
            [*TRAIN, "--nnodes=2", "--nproc-per-node=1", "--rdzv-endpoint", endpoint],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=clean_environment(),
        )
        started.append(process)
        assert "starting 1 rank(s)" in first_line(process)
        silent.settimeout(TIMEOUT_S)
        with silent.accept()[0]:  # blocked in C++ from here on
            process.send_signal(number)
            _, err = process.communicate(timeout=15)
    assert (process.returncode, err) == (128 + number, "")


@pytest.mark.ranks
@pytest.mark.parametrize("how", ["SIGTERM", "a notebook's interrupt"])
def test_a_stop_in_a_step_of_6_s_leaves_a_checkpoint_of_that_step(
    images_folder, shared_cache, started, tmp_path, how
):
    flags = ["--nproc-per-node", "2", "--data", str(images_folder), "--data-dir", shared_cache]
    flags += ["--model", "tests.lab.models:SlowStep", "--run-dir", str(tmp_path / "run")]
    flags += ["--global-batch-size", "63", "--checkpoint-every-s", "1000"]
    slow, checkpoint = tmp_path / "slow", tmp_path / "run" / "checkpoint.pt"
    environment = clean_environment() | {"SLOW_STEP": str(slow)}

    def wait_for_step() -> None:
        wait_until(lambda: all(Path(f"{slow}.{rank}").exists() for rank in range(2)))

    if how == "SIGTERM":
        process = subprocess.Popen(
            [*TRAIN, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        started.append(process)
        wait_for_step()
        process.terminate()
        status, out, err = end(process)
        assert (status, err) == (143, []), out
    else:  # of `!ddp-launch train`, as IPython does it
        child = pexpect.spawn(shlex.join([*TRAIN, *flags]), env=environment)
        wait_for_step()
        child.sendline(chr(3))
        time.sleep(0.2)
        child.terminate(force=True)
        child.close()
        wait_until(checkpoint.exists)
    assert torch.load(checkpoint, weights_only=True)["step"] == 3


@pytest.mark.ranks
def test_no_rank_outlives_a_killed_agent(start, tmp_path):
    process = start(DONE, "--nproc-per-node=2")
    both = ranks(tmp_path)
    process.kill()
    assert all_gone(both)
    # SIGTERM, by the rank's own watch; or the SIGINT that torch orders for a parent's death.
    assert {(tmp_path / f"left{rank}").read_text() for rank in range(2)} <= {"15", "2"}


@pytest.mark.ranks
def test_ctrl_c_while_torch_loads_says_nothing(started, tmp_path):
    """As a terminal sends it: to the agent, and to the fork server that imports torch."""
    process = subprocess.Popen(
        [*TRAIN, "--nproc-per-node=2", "--data=shapes"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=clean_environment(),
        process_group=0,
    )
    started.append(process)
    assert "starting 2 rank(s)" in first_line(process)
    agent = psutil.Process(process.pid)
    # 40 MB: past Python's own start, far from the 200 MB that torch takes.
    wait_until(lambda: any(child.memory_info().rss > 4e7 for child in agent.children()))
    os.killpg(process.pid, signal.SIGINT)
    status, out, err = end(process)
    assert (status, out, err) == (130, "", [])
    assert list(tmp_path.iterdir()) == []
