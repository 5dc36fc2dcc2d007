"""ddp-launch check names each cause; here each is made for real."""

import re

import pytest

TIMEOUT_S = 300
FLAGS = ("--nnodes=2", "--nproc-per-node=1", "--rdzv-endpoint=10.77.0.10:29500")
# Another clock, another torch, GPUs: the machines share this computer's.
PATCHED = """
import sys, time
from ddp_lib.launch.main import main
import torch
true_time = time.time
{}
sys.exit(main(sys.argv[1:]))
"""


def check(machine, *flags, patch: str = "", **environment):
    command = ["python", "-c", PATCHED.format(patch)] if patch else ["ddp-launch"]
    return machine.start([*command, "check", *flags], **environment)


def outcomes(programs) -> list[tuple[int, list[str], list[str]]]:
    """Of each: exit status, the table's rows, and the lines after it."""
    results = []
    for program in programs:
        status = program.wait(TIMEOUT_S)
        lines = program.output.splitlines()
        assert "Traceback" not in program.output
        said = [line for line in lines if line.startswith("ddp-launch")]
        results.append((status, [line for line in lines if line not in said], said))
    return results


def test_all_is_well_with_three_machines(make_lab, tiny):
    machines = make_lab(3).machines
    flags = ("--nnodes=3", "--rdzv-endpoint=m0:29500", *tiny[:4], "--nproc-per-node=1")
    programs = [check(machine, *flags) for machine in reversed(machines)]
    results = outcomes(programs)
    assert [(status, said) for status, _, said in results] == [(0, ["ddp-launch check: all is well"])] * 3
    tables = [table[:-1] for _, table, _ in results]
    assert tables[0] == tables[1] == tables[2]  # the same on every machine
    assert len(tables[0]) == 4 and tables[0][1].startswith("m0 (master)  10.77.0.10  eth0")
    for row in tables[0][1:]:
        assert re.search(r"2 of 2 +\d+\.\d\d ms +\d+\.\d\d Gbit/s", row)
    assert all(machine.processes() == [] for machine in machines)


def closed_port(machines):
    machines[1].close_ports(but=29500)
    return [check(machine, *FLAGS) for machine in machines[:2]]


def masters_port_closed(machines):
    machines[0].close_ports("29500")
    return [check(machine, *FLAGS) for machine in machines[:2]]


def loopback_name(machines):
    machines[1].write_hosts({"m0": "127.0.0.1", "m1": machines[1].address})
    line = ("--nnodes=2", "--rdzv-endpoint=m0:29500", "--nproc-per-node=1")
    return [check(machine, *line) for machine in machines[:2]]


def container_address(machines):
    """m1's program in a container of its own on m1, behind m1's address."""
    box, host = machines[2], machines[1]
    link = "ip link add inner type veth peer name eth1 netns"
    host.namespaces.network(*link.split(), str(box.namespaces.pid))
    for words in ("link set inner up", "address add 172.17.0.1/16 dev inner"):
        host.namespaces.network("ip", *words.split())
    host.namespaces.network("sysctl", "-qw", "net.ipv4.ip_forward=1")
    nat = "iptables -t nat -A POSTROUTING -s 172.17.0.0/16 -o eth0 -j MASQUERADE"
    host.namespaces.network(*nat.split())
    for words in (
        "link set eth0 down",
        "link set eth1 up",
        "address add 172.17.0.2/16 dev eth1",
        "route add default via 172.17.0.1",
    ):
        box.namespaces.network("ip", *words.split())
    return [check(machines[0], *FLAGS), check(box, *FLAGS)]


def four(machine, rank, size, master="10.77.0.10"):
    names = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": master, "MASTER_PORT": 29500}
    environment = {name: str(value) for name, value in names.items()}
    return check(machine, **environment)


def not_started(machines):
    return [four(machines[1], 1, 2)]


def missing(machines):
    return [four(machines[0], 0, 2)]


def sizes(machines):
    return [four(machines[0], 0, 2), four(machines[1], 1, 3)]


def twice(machines):
    return [four(machines[rank], number, 3) for rank, number in enumerate((0, 1, 1))]


def patched(*patches):
    def start(machines):
        return [
            check(machine, *FLAGS, patch=patch) for machine, patch in zip(machines, patches, strict=False)
        ]

    return start


def no_gpu_for_nccl(machines):
    return [check(machine, *FLAGS, "--backend=nccl") for machine in machines[:2]]


other_torch = patched("", "torch.__version__ = '2.0.1'")
other_clock = patched("", "time.time = lambda: true_time() + 90")
one_gpu = patched("torch.cuda.device_count = lambda: 1", "")

# Each: how it is made, and what the lines of each machine hold, one line for each cause.
CAUSES = {
    "a closed port": (closed_port, [["m1 (10.77.0.11) cannot be reached"]] * 2),
    "the master's port closed": (
        masters_port_closed,
        [["1 of 2 machines did not come"], ["no answer from --rdzv-endpoint 10.77.0.10:29500"]],
    ),
    "a name that means loopback": (
        loopback_name,
        [["1 of 2 machines did not come"], ["did not come", "means 127.0.0.1 here"]],
    ),
    "a container's address": (container_address, [["--network host"]] * 2),
    "master not started": (not_started, [["nobody listens on MASTER_ADDR=10.77.0.10"]]),
    "a machine is missing": (missing, [["1 of 2 machines (RANK 1) did not come"]]),
    "WORLD_SIZE differs": (sizes, [["WORLD_SIZE is 3 on m1 (10.77.0.11), but 2 on m0"]] * 2),
    "RANK twice": (twice, [["RANK=1 is set on m"]] * 3),
    "another torch": (other_torch, [["torch is 2.0.1 on m1"]] * 2),
    "another clock": (other_clock, [["the clock of m1 (10.77.0.11) is 90.0 s ahead of m0"]] * 2),
    "a GPU is missing": (one_gpu, [["m1 (10.77.0.11) has 0 GPU(s) for 1 rank(s), but m0"]] * 2),
    "no GPU for nccl": (no_gpu_for_nccl, [["m0 (10.77.0.10) has 0 GPU(s)", "m1 (10.77.0.11) has 0"]] * 2),
}  # fmt: skip


@pytest.mark.parametrize(("make", "named"), CAUSES.values(), ids=CAUSES)
def test_a_cause_is_named(make_lab, make, named):
    machines = make_lab(3).machines
    programs = make(machines)
    for (status, table, said), expected in zip(outcomes(programs), named, strict=True):
        assert status == 2 and table[0].startswith("machine "), (table, said)
        assert len(said) == len(expected), said
        for line, text in zip(said, expected, strict=True):
            assert text in line
    assert all(machine.processes() == [] for machine in machines)
