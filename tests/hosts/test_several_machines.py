"""Training on several machines, in the network set-ups that people have."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from tests.lab.project import ROOT

TIMEOUT_S = 300  # for what takes seconds on an idle machine
ENDPOINT = "10.77.0.10:29500"
LOSS = r"epoch \d/2 batch \d+/3 loss \d"


def end_well(programs, machines) -> None:
    for program in programs:
        assert program.wait(TIMEOUT_S) == 0, program.output
    for machine in machines:
        assert machine.left() == []


def summary(machine) -> dict:
    return json.loads((machine.folder / "run" / "summary.json").read_text())


# Ends once the machine has refused a connection to a port on which no program listens.
REFUSED = "until awk '/^Tcp:/ {n = $15} END {exit !(n > 0)}' /proc/net/snmp; do sleep 0.1; done"


def steps_logged(machine) -> dict[str, int]:
    """The number of steps in each rank's log on the machine."""
    logs = sorted((machine.folder / "run").glob("rank*.jsonl"))
    return {log.stem: log.read_text().count('"loss"') for log in logs}


def test_by_four_variables_the_worker_first(make_lab, train):
    master, worker = make_lab(2).machines
    second = train(worker, rank=1, master=master.address)
    master.run(["sh", "-c", REFUSED], TIMEOUT_S)
    first = train(master, rank=0, master=master.address)
    end_well([first, second], [master, worker])
    for program in (first, second):  # loss by epoch and batch on both consoles
        assert len(re.findall(LOSS, program.output)) >= 2
    assert len(set(summary(master)["weights_sha256"])) == 1
    assert (master.folder / "run" / "cifar_net.pth").exists()
    assert not (worker.folder / "run" / "cifar_net.pth").exists()
    assert steps_logged(master) == {"rank0": 6, "rank1": 6}


def test_four_machines_of_two_ranks(make_lab, train):
    machines = make_lab(4).machines
    flags = ("--nnodes=4", "--nproc-per-node=2", "--rdzv-endpoint", ENDPOINT)
    flags += ("--global-batch-size=208",)
    end_well([train(machine, *flags) for machine in reversed(machines)], machines)
    digests = summary(machines[0])["weights_sha256"]
    assert len(digests) == 8 and len(set(digests)) == 1
    steps = len(range(0, 630 - 207, 208)) * 2  # whole batches of two epochs
    assert steps_logged(machines[0]) == {f"rank{rank}": steps for rank in range(8)}


# Each: machines' names, families, and what their hosts files say; all names are m0 and m1 else.
SETUPS = {
    "plain": {},
    "Debian's 127.0.1.1": {"own": "127.0.1.1", "endpoint": "m0:29500"},
    "own name unknown": {"own": None},
    "all of one name": {"names": ["box", "box"]},
    "IPv6 only": {"ipv4": False, "ipv6": True, "endpoint": "[fd77::10]:29500"},
}


def set_up(make_lab, own="", endpoint=ENDPOINT, **lab):
    machines = make_lab(2, **lab).machines
    if own != "":
        for machine in machines:
            names = {other.name: other.address for other in machines if other is not machine}
            machine.write_hosts({**names, **({machine.name: own} if own else {})})
    return machines, endpoint


@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
def test_usual_network_setups_train_and_listen_inside_only(make_lab, train, setup):
    machines, endpoint = set_up(make_lab, **setup)
    flags = ("--nnodes=2", "--nproc-per-node=1", "--rdzv-endpoint", endpoint, "--epochs=3000")
    first, second = (train(machine, *flags) for machine in machines)
    for program in (first, second):
        program.wait_for(r"epoch 1/3000 batch 3/3 loss", TIMEOUT_S)
    # Nobody listens to the whole world: the store has no password.
    for machine in machines:
        sockets = machine.run(["ss", "-Hltn"]).split("\n")
        heard_at = {line.split()[3].rpartition(":")[0].strip("[]") for line in sockets if line}
        assert heard_at <= {machine.address}, sockets
    assert "rank 0 on" in first.output and "rank 0 on" not in second.output  # rank 0 is the master's
    first.signal(2)
    assert [program.wait(TIMEOUT_S) for program in (first, second)] == [130, 130]


@pytest.mark.parametrize("launcher", [True, False], ids=["ddp-launch", "four variables"])
def test_only_the_masters_port_is_open(make_lab, train, launcher):
    machines = make_lab(2).machines
    for machine in machines:
        machine.close_ports(but=29500)
    flags = ("--nnodes=2", "--nproc-per-node=1", "--rdzv-endpoint", ENDPOINT)
    for rank, machine in enumerate(machines):
        if launcher:
            train(machine, *flags)
        else:
            train(machine, rank=rank, master=machines[0].address)
    for machine in machines:
        program = machine.programs[-1]
        assert program.wait(TIMEOUT_S) not in (0, None)
        errors = [line for line in program.output.splitlines() if "error:" in line]
        assert len(errors) == 1, program.output
        assert "firewall" in errors[0] or "open all ports" in errors[0]


def test_the_dry_run_is_a_torchrun_command_that_trains(make_lab, train, tiny):
    machines, endpoint = set_up(make_lab, **SETUPS["Debian's 127.0.1.1"])
    flags = ("--nnodes=2", "--nproc-per-node=1", "--rdzv-endpoint", endpoint)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    programs = []
    for machine in machines:
        shown = train(machine, *flags, "--dry-run")
        assert shown.wait(TIMEOUT_S) == 0
        assert "torchrun" in shown.output and "GLOO_SOCKET_IFNAME=eth0" in shown.output
        line = ["sh", "-c", shown.output]
        programs.append(machine.start(line, cwd=ROOT, PATH=path))
    end_well(programs, machines)


def test_what_the_user_has_set_wins(make_lab, train):
    machine = make_lab(2).machines[1]
    own = {
        "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "eth9", "OMP_NUM_THREADS": "7",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "0",
        "PET_NNODES": "2", "PET_NPROC_PER_NODE": "3", "PET_NODE_RANK": "1",
        "PET_MASTER_ADDR": "10.77.0.10", "PET_MASTER_PORT": "29501",
    }  # fmt: skip
    shown = train(machine, "--dry-run", "--nproc-per-node", "1", **own)
    assert shown.wait(TIMEOUT_S) == 0
    for name, value in list(own.items())[:4]:
        assert f"{name}={value} " in shown.output
    rest = "--nnodes 2 --nproc-per-node 1 --max-restarts 0 --node-rank 1 --master-addr 10.77.0.10"
    assert rest + " --master-port 29501 -m ddp_lib.train" in shown.output


def test_kubeflows_variables_and_static_ranks(make_lab, train):
    machines = make_lab(2).machines
    common = {
        "PET_NNODES": "2", "PET_NPROC_PER_NODE": "1",
        "PET_MASTER_ADDR": "m1", "PET_MASTER_PORT": "29600",
    }  # fmt: skip
    programs = [
        train(machine, **common, PET_NODE_RANK=str(1 - number)) for number, machine in enumerate(machines)
    ]
    end_well(programs, machines)
    assert "[rank 0]" in programs[1].output and "[rank 1]" in programs[0].output
    assert (machines[1].folder / "run" / "cifar_net.pth").exists()


DIFFERENT_TORCH = """
import sys, torch
torch.__version__ = "2.0.1"
from ddp_lib.train import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("what", ["flag", "data", "torch"])
def test_a_difference_is_refused_by_machine_and_field(make_lab, train, tiny, tmp_path, what):
    master, worker = make_lab(2).machines
    programs = [train(master, rank=0, master=master.address)]
    named = "--lr is 0.3 for rank 1 on m1, but 0.2 for rank 0 on m0"
    if what == "flag":
        programs.append(train(worker, "--lr=0.3", rank=1, master=master.address))
    elif what == "data":
        from PIL import Image

        for number in range(210):
            file = (
                tmp_path / "images" / ("test" if number < 2 else "train") / "ab"[number % 2] / f"{number}.png"
            )
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (number, 0, 0)).save(file)
        other = str(tmp_path / "images")
        programs.append(train(worker, "--data", other, rank=1, master=master.address))
        named = "the number of training images is 208 for rank 1 on m1, but 630 for rank 0 on m0"
    else:
        four = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "m0", "MASTER_PORT": "29500"}
        command = ["python", "-c", DIFFERENT_TORCH, *tiny]
        programs.append(worker.start(command, cwd=ROOT, **four))
        named = "torch is '2.0.1' for rank 1 on m1, but"
    for program in programs:
        assert program.wait(TIMEOUT_S) == 2, program.output
        assert named in program.output and "Traceback" not in program.output
    assert [machine.processes() for machine in (master, worker)] == [[], []]
