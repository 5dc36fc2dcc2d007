"""Two machines in the network set-ups that people have: torchrun and ddp-launch.

sudo python benchmarks/network_setups.py [--timeout-s 60] [--only WORD]

The machines are network namespaces of this computer. On both machines, `torchrun` and `ddp-launch run` start
the same plain DDP script (plain_ddp.py) with the same environment and the same flags, and nothing else:
--nnodes 2 --nproc-per-node 1 --rdzv-endpoint MASTER:29500. torchrun also gets --rdzv-backend c10d, which
ddp-launch always uses. Programs that still run at the timeout are ended. Writes results/network_setups.json
and the table in the README.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from report import into_readme, save, table

from tests.lab.machines import Lab, Machine
from tests.lab.namespaces import missing
from tests.lab.program import Program

PLAIN = Path(__file__).with_name("plain_ddp.py")
LAUNCHERS = ("torchrun", "ddp-launch run")
MASTER = "10.77.0.10:29500"


def hosts_files(own: str | None) -> Callable[[list[Machine]], None]:
    """On each machine its own name means `own`, or nothing if None; other names mean the right address."""

    def write(machines: list[Machine]) -> None:
        for machine in machines:
            peers = {peer.name: peer.address for peer in machines if peer is not machine}
            machine.write_hosts({**peers, **({machine.name: own} if own else {})})

    return write


def one_port(machines: list[Machine]) -> None:
    for machine in machines:
        machine.close_ports(but=29500)


def another_network(name: str) -> Callable[[list[Machine]], None]:
    """On each machine an interface `name` that leads to no other machine; its own host name means the address
    there, and the default route goes there."""

    def add(machines: list[Machine]) -> None:
        for machine in machines:
            address = f"172.{17 + machine.number}.0.1"  # as Docker's bridge has, but another on each
            for words in (
                f"link add {name} type veth peer name peer0",
                f"address add {address}/16 dev {name}",
                f"link set {name} up",
                "link set peer0 up",
                f"route add default dev {name}",
            ):
                machine.namespaces.network("ip", *words.split())
            others = {peer.name: peer.address for peer in machines if peer is not machine}
            machine.write_hosts({**others, machine.name: address})

    return add


def a_first_interface_of_its_own(machines: list[Machine]) -> None:
    """docker0 stands before eth0 in the system's list, and has the same address on both machines."""
    for machine in machines:
        for words in (
            "link set eth0 down",
            "link set eth0 name cable",
            "link add docker0 type bridge",
            "link set cable name eth0",
            "link set eth0 up",
            "address add 172.17.0.1/16 dev docker0",
            "link set docker0 up",
        ):
            machine.namespaces.network("ip", *words.split())
        machine.write_hosts({peer.name: peer.address for peer in machines if peer is not machine})


def names_of_either_family(machines: list[Machine]) -> None:
    """Names mean IPv6 addresses on the master, and IPv4 addresses on the other machine."""
    master, other = machines
    master.write_hosts({machine.name: machine.ipv6 for machine in machines})
    other.write_hosts({machine.name: machine.ipv4 for machine in machines})


BOTH = {"ipv4": True, "ipv6": True}
# Name, the lab's settings, how the machines are changed, the endpoint.
SETUPS: list[tuple[str, dict, Callable[[list[Machine]], None], str]] = [
    ("own name means own address", {}, lambda machines: None, "m0:29500"),
    ("own name means 127.0.1.1 (Debian)", {}, hosts_files("127.0.1.1"), "m0:29500"),
    ("own name means nothing", {}, hosts_files(None), MASTER),
    ("both machines have one name", {"names": ["box", "box"]}, lambda machines: None, MASTER),
    ("only the master's port is open", {}, one_port, MASTER),
    ("IPv6 only", {"ipv4": False, "ipv6": True}, lambda machines: None, "[fd77::10]:29500"),
    ("two interfaces; own name and default route mean the other", {}, another_network("lan0"), MASTER),
    ("docker0 first, with one address on both", {}, a_first_interface_of_its_own, MASTER),
    ("names mean IPv6 on the master, IPv4 on the other", BOTH, names_of_either_family, "m0:29500"),
]


def start(launcher: str, machine: Machine, endpoint: str) -> Program:
    line = f"--nnodes 2 --nproc-per-node 1 --rdzv-endpoint {endpoint}".split()
    head = {"torchrun": ["torchrun", "--rdzv-backend", "c10d"], "ddp-launch run": ["ddp-launch", "run"]}
    return machine.start([*head[launcher], *line, str(PLAIN)])


def outcome(programs: list[Program], timeout_s: float) -> tuple[str, float]:
    """What happened, in words, and the seconds until both programs had ended, or the timeout."""
    start_s = time.monotonic()
    while not all(program.ended for program in programs) and time.monotonic() < start_s + timeout_s:
        time.sleep(0.05)
    seconds = time.monotonic() - start_s
    hung = [program for program in programs if not program.ended]
    for program in hung:
        program.end()
    statuses = [program.wait(timeout_s) for program in programs]
    if hung:
        return "hangs" if len(hung) == 2 else "one machine fails, the other hangs", seconds
    if statuses == [0, 0]:
        return "works", seconds
    lines = [line for p in programs for line in p.output.splitlines() if "ddp-launch: error:" in line]
    if len(lines) == 2:
        return f"names the cause: “{lines[-1].partition('error: ')[2]}”", seconds
    return "fails, the cause not named", seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--timeout-s", type=float, default=60.0)
    parser.add_argument("--only", default="", help="only set-ups whose name contains this word")
    options = parser.parse_args()
    if lacks := missing():
        raise SystemExit(lacks)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, settings, change, endpoint) in enumerate(SETUPS):
            if options.only not in name:
                continue
            row: dict[str, str | float] = {"network set-up": name}
            for launcher in LAUNCHERS:
                with Lab(2, Path(folder) / f"{number}-{launcher.split()[0]}", **settings) as lab:
                    change(lab.machines)
                    programs = [start(launcher, machine, endpoint) for machine in lab.machines]
                    what, seconds = outcome(programs, options.timeout_s)
                row |= {launcher: what, f"{launcher}, s": round(seconds, 1)}
                print(f"{name}: {launcher}: {what} ({seconds:.1f} s)", flush=True)
            rows.append(row)
    if options.only:
        return
    works = [sum(row[launcher] == "works" for row in rows) for launcher in LAUNCHERS]
    result = save(
        "network_setups",
        "Network set-ups and launchers",
        "Two machines (network namespaces), one rank each. Both launchers start the same plain DDP script of "
        "20 steps, with the same flags and environment. Seconds are counted until the programs on both "
        "machines have ended, the start of Python included. Programs that still ran after "
        f'{options.timeout_s:g} s were ended; the table says "hangs".',
        rows,
        [f"torchrun works in {works[0]} of {len(rows)} set-ups, ddp-launch run in {works[1]}."],
    )
    into_readme("network_setups", result)
    print(table(rows))


if __name__ == "__main__":
    main()
