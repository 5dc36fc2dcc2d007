"""Which of several addresses the machines use, and ways on which not all packets get through."""

import pytest

from tests.lab.own_script import START
from tests.lab.project import ROOT

TIMEOUT_S = 120
TRAINS = "join()\nprint(step().tolist(), os.environ['GLOO_SOCKET_IFNAME'])\ndist.destroy_process_group()\n"


def start(machine, endpoint: str, *flags: str, lines: str = TRAINS, **environment: str):
    (machine.folder / "own.py").write_text(START + lines)
    flags = ("--nnodes=2", "--nproc-per-node=1", f"--rdzv-endpoint={endpoint}", *flags)
    return machine.start(["ddp-launch", "run", *flags, "own.py"], **environment)


def docker0(machine, own: str) -> None:
    """docker0 has the default route; the machine's own name means `own`."""
    machine.add_interface("docker0", f"172.{17 + machine.number}.0.1/16")
    machine.namespaces.network("ip", "route", "add", "default", "dev", "docker0")
    machine.write_hosts({"m0": "10.77.0.10", "m1": "10.77.0.11", machine.name: own})


# What the master's own name means there.
@pytest.mark.parametrize("own", ["127.0.1.1", "172.17.0.1"])
def test_the_master_takes_the_address_at_which_others_reach_it(make_lab, own):
    machines = make_lab(2).machines
    for machine in machines:
        docker0(machine, own if machine is machines[0] else "127.0.1.1")
    programs = [start(machine, "m0:29500") for machine in machines]
    for rank, program in enumerate(programs):
        assert program.wait(TIMEOUT_S) == 0, program.output
        assert f"[rank {rank}] [2.0, 2.0] eth0" in program.output


def test_one_of_two_machines_has_no_ipv6(make_lab):
    machines = make_lab(2, ipv4=True, ipv6=True).machines
    for machine in machines:
        machine.write_hosts({other.name: f"{other.ipv6} {other.ipv4}" for other in machines})
    machines[1].namespaces.network("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
    for program in [start(machine, "m0:29500") for machine in machines]:
        assert program.wait(TIMEOUT_S) == 0, program.output


def test_the_users_interface_is_probed_and_used(make_lab):
    lab = make_lab(2)
    lab.add_network()
    for machine in lab.machines:
        machine.close_ports(but=29500)  # on eth0
    programs = [start(m, "10.77.0.10:29500", GLOO_SOCKET_IFNAME="eth1") for m in lab.machines]
    for rank, program in enumerate(programs):
        assert program.wait(TIMEOUT_S) == 0, program.output
        assert f"[rank {rank}] [2.0, 2.0] eth1" in program.output


# The launcher, on a machine of which torch says that it has a GPU.
WITH_GPU = """
import sys, torch
from ddp_lib.launch.main import main
torch.cuda.device_count = lambda: 1
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("closed", "names"), [(False, "=eth0,eth1"), (True, "=eth0")])
def test_nccl_is_told_of_the_networks_that_lead_to_all(make_lab, closed, names):
    lab = make_lab(2)
    lab.add_network()
    for machine in lab.machines:
        machine.add_interface("docker0", "172.17.0.1/16")
        (machine.folder / "own.py").write_text("import os\nprint(os.environ['NCCL_SOCKET_IFNAME'])\n")
        if closed:
            machine.namespaces.network(*"iptables -A INPUT -i eth1 -p tcp -j DROP".split())
    flags = "run --nnodes=2 --nproc-per-node=1 --rdzv-endpoint=10.77.0.10:29500 own.py".split()
    programs = [machine.start(["python", "-c", WITH_GPU, *flags]) for machine in lab.machines]
    for rank, program in enumerate(programs):
        assert program.wait(TIMEOUT_S) == 0, program.output
        assert f"[rank {rank}] {names}\n" in program.output


@pytest.mark.parametrize("how", ["DROP", "REJECT"])
def test_closed_ports_are_named_with_the_other_networks(make_lab, how):
    lab = make_lab(2)
    lab.add_network()
    for machine in lab.machines:
        machine.close_ports(but=29500, how=how)
    programs = [start(m, "10.77.0.10:29500", lines="") for m in lab.machines]
    for program in programs:
        assert program.wait(TIMEOUT_S) == 2, program.output
        line = program.output.splitlines()[-1]
        assert {"DROP": "gets no answer", "REJECT": "is refused"}[how] in line
        assert "set GLOO_SOCKET_IFNAME to its interface: eth1 (10.78.0.1" in line


@pytest.mark.parametrize(("command", "status"), [("run", 75), ("check", 2)])
def test_large_packets_that_get_lost_are_named(make_lab, command, status):
    master, other = make_lab(2).machines
    other.lose_large_packets()
    flags = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-endpoint=10.77.0.10:29500"]
    script = [str(ROOT / "examples/own_script/ddp.py")] if command == "run" else []
    _, program = [m.start(["ddp-launch", command, *flags, *script]) for m in (master, other)]
    assert program.wait(TIMEOUT_S) == status, program.output
    line = program.output.splitlines()[-1]
    assert "passes small packets, but not 64 KiB: the MTU (1500 on eth0 here) is too large" in line
