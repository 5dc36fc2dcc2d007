"""Several machines on this one: each has its own network, host name, /etc/hosts and processes.

with Lab(2, folder) as lab:
    master, worker = lab.machines              # 10.77.0.10 "m0" and 10.77.0.11 "m1"
    program = worker.start(["ddp-launch", "train", ...], cwd=somewhere, RANK="1")
    program.wait_for("batch", timeout_s=60)      # the line of its output that holds this
    worker.cut()                               # pull the cable; worker.plug() puts it back
    assert program.wait(timeout_s=60) == 2, program.output

A machine is a set of Linux namespaces (network, host name, mounts, processes) without a name, joined
to the others by a bridge in a namespace of its own. So two labs, of two test runs, share nothing; and
when the process that made a lab dies, however it dies, the kernel removes the machines and all that
runs on them: no leftovers. All machines see the same disk: give each a folder of its own.

Needs Linux, root, iproute2, iptables and util-linux: see `namespaces.missing`.
"""

import os
from contextlib import suppress
from pathlib import Path

import psutil

from tests.lab.namespaces import TIMEOUT_S, Namespaces
from tests.lab.program import Program, kill_all

IPV4, IPV6, SECOND = "10.77.0.{}", "fd77::{}", "10.78.0.{}"

FIRST = 10  # machine i has the addresses 10.77.0.(10 + i) and fd77::(10 + i)


class Lab:
    """`count` machines m0, m1, ... on one switch; they exist inside `with`.

    folder: where the machines' hosts files and the programs' outputs lie. names: the host names, if
    others are wanted (they may be equal). Every machine's /etc/hosts names all machines, by IPv4
    unless there is none; `Machine.write_hosts` writes another.
    """

    def __init__(
        self,
        count: int,
        folder: Path,
        names: list[str] | None = None,
        ipv4: bool = True,
        ipv6: bool = False,
    ) -> None:
        self.folder, self.ipv4, self.ipv6 = folder, ipv4, ipv6
        self._switch: Namespaces | None = None
        self.machines: list[Machine] = []
        self._names = names or [f"m{i}" for i in range(count)]
        self._count = count

    def __enter__(self) -> "Lab":
        try:
            self._switch = Namespaces("ip link add br0 type bridge; ip link set br0 up")
            for i in range(self._count):
                self.machines.append(Machine(self, self._switch, i, self._names[i]))
            for machine in self.machines:
                machine.write_hosts({other.name: other.address for other in reversed(self.machines)})
        except BaseException:
            self.__exit__()
            raise
        return self

    def add_network(self) -> None:
        """A second switch: interface eth1 of each machine, with 10.78.0.(10 + i)."""
        assert self._switch is not None
        self._switch.network("ip", "link", "add", "br1", "type", "bridge")
        self._switch.network("ip", "link", "set", "br1", "up")
        for machine in self.machines:
            port = f"second{machine.number}"
            cable = f"{port} type veth peer name eth1 netns {machine.namespaces.pid}"
            self._switch.network("ip", "link", "add", *cable.split())
            self._switch.network("ip", "link", "set", port, "master", "br1", "up")
            address = SECOND.format(FIRST + machine.number)
            machine.namespaces.network("ip", "address", "add", f"{address}/24", "dev", "eth1")
            machine.namespaces.network("ip", "link", "set", "eth1", "up")

    def __exit__(self, *_: object) -> None:
        for machine in self.machines:
            machine.end_all()
            machine.namespaces.remove()
        if self._switch is not None:
            self._switch.remove()


class Machine:
    """One machine. `address` is its IPv4 address, or its IPv6 address if it has no other."""

    def __init__(self, lab: Lab, switch: Namespaces, number: int, name: str) -> None:
        self.number, self.name, self._switch = number, name, switch
        self.ipv4 = IPV4.format(FIRST + number) if lab.ipv4 else ""
        self.ipv6 = IPV6.format(FIRST + number) if lab.ipv6 else ""
        self.address = self.ipv4 or self.ipv6
        self.folder = lab.folder / f"machine{number}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._hosts = self.folder / "hosts"
        self.write_hosts({})
        self._port = f"port{number}"
        self.programs: list[Program] = []
        self._frozen: list[psutil.Process] = []
        self.namespaces = Namespaces(
            'echo "$0" > /proc/sys/kernel/hostname; ip link set lo up; mount --bind "$1" /etc/hosts',
            name,
            str(self._hosts),
        )
        cable = f"{self._port} type veth peer name eth0 netns {self.namespaces.pid}"
        switch.network("ip", "link", "add", *cable.split())
        switch.network("ip", "link", "set", self._port, "master", "br0", "up")
        for address in filter(None, (self.ipv4 and self.ipv4 + "/24", self.ipv6 and self.ipv6 + "/64")):
            nodad = ["nodad"] if ":" in address else []
            self.namespaces.network("ip", "address", "add", address, "dev", "eth0", *nodad)
        self.namespaces.network("ip", "link", "set", "eth0", "up")

    def add_interface(self, name: str, address: str) -> None:
        """An interface that leads to no machine, such as docker0."""
        for words in (
            f"link add {name} type veth peer name {name}-far",
            f"address add {address} dev {name}",
            f"link set {name} up",
            f"link set {name}-far up",
        ):
            self.namespaces.network("ip", *words.split())

    def write_hosts(self, names: dict[str, str], localhost: bool = True) -> None:
        """Makes `name -> address` all that this machine's /etc/hosts says, beside localhost. A name may have
        several addresses, with a space between them."""
        lines = ["127.0.0.1 localhost", "::1 localhost"] if localhost else []
        lines += [f"{address} {name}" for name, text in names.items() for address in text.split()]
        self._hosts.write_text("\n".join(lines) + "\n")  # in place: the file is mounted

    def start(self, command: list[str], cwd: Path | None = None, **environment: str) -> "Program":
        """Starts a command here, in `cwd` (default: the machine's folder).

        It gets this process's environment, less what says which rank it is, and with `environment`. Words
        "ddp-launch", "torchrun" and "python" at its head mean this Python's.
        """
        program = Program(self, command, cwd or self.folder, environment, len(self.programs))
        self.programs.append(program)
        return program

    def run(self, command: list[str], timeout_s: float = TIMEOUT_S, **environment: str) -> str:
        """Output of a command that must succeed."""
        program = self.start(command, **environment)
        assert program.wait(timeout_s) == 0, program.output
        return program.output

    def processes(self) -> list[psutil.Process]:
        """All that runs here, as processes of this computer; process 1 is left out."""
        space = os.readlink(f"/proc/{self.namespaces.pid}/ns/pid")
        running = []
        for process in psutil.process_iter():
            try:
                inside = os.readlink(f"/proc/{process.pid}/ns/pid") == space
                if inside and process.status() != psutil.STATUS_ZOMBIE:
                    running.append(process)
            except (OSError, psutil.NoSuchProcess):
                continue
        return [process for process in running if process.pid != self.namespaces.pid]

    def left(self) -> list[psutil.Process]:
        """What still runs here after the moment that Python's resource tracker takes to follow."""
        return psutil.wait_procs(self.processes(), timeout=TIMEOUT_S)[1]

    def freeze(self) -> None:
        """Stops all that runs here, as a frozen kernel would; `resume` lets it go on."""
        self._frozen = self.processes()
        for process in self._frozen:
            process.suspend()

    def resume(self) -> None:
        for program in self.programs:
            program.resume()
        for process in self._frozen:
            with suppress(psutil.NoSuchProcess):
                process.resume()
        self._frozen = []

    def end_all(self) -> None:
        """SIGKILL to all that runs here, as when the power fails (`cut` first, and no peer hears)."""
        while running := self.processes():  # again: a process may have started another meanwhile
            kill_all(running)
        for program in self.programs:
            program.wait(TIMEOUT_S)

    # The network

    def cut(self) -> None:
        """Pulls the machine's cable at the switch: packets vanish, and no program is told."""
        self._switch.network("ip", "link", "set", self._port, "down")

    def plug(self) -> None:
        self._switch.network("ip", "link", "set", self._port, "up")

    def limit_rate(self, rate: str) -> None:
        """Both ways, to a rate as tc writes it: "20mbit"."""
        shape = f"root tbf rate {rate} burst 64kb latency 50ms".split()
        self._switch.network("tc", "qdisc", "replace", "dev", self._port, *shape)
        self.namespaces.network("tc", "qdisc", "replace", "dev", "eth0", *shape)

    def full_rate(self) -> None:
        self._switch.network("tc", "qdisc", "del", "dev", self._port, "root")
        self.namespaces.network("tc", "qdisc", "del", "dev", "eth0", "root")

    def close_ports(self, ports: str = "0:65535", but: int | None = None, how: str = "DROP") -> None:
        """Lets no new TCP connection in from outside to `ports` ("500:600"), or to any but one.

        how: DROP (packets vanish) or REJECT (the other side is refused at once).
        """
        wanted = ["--dport", ports] if but is None else ["!", "--dport", str(but)]
        refuse = ["--reject-with", "tcp-reset"] if how == "REJECT" else []
        for tool in ("iptables", "ip6tables"):
            rule = [tool, "-A", "INPUT", "-i", "eth0", "-p", "tcp", "--syn", *wanted]
            self.namespaces.network(*rule, "-j", how, *refuse)

    def lose_large_packets(self, over: int = 1000) -> None:
        """Drops what comes in and is larger, as where the MTU of the way is smaller than the interfaces'."""
        self.namespaces.network("ip", "link", "set", "eth0", "gso_max_size", "1500", "gro_max_size", "1500")
        rule = f"INPUT -i eth0 -p tcp -m length --length {over}:65535 -j DROP"
        self.namespaces.network("iptables", "-A", *rule.split())

    def open_ports(self) -> None:
        """Takes every such rule away."""
        for tool in ("iptables", "ip6tables"):
            self.namespaces.network(tool, "-F", "INPUT")
