"""Several machines on this one: each has its own network, host name, /etc/hosts and processes.

with Lab(2, folder) as lab:
    master, worker = lab.machines              # 10.77.0.10 "m0" and 10.77.0.11 "m1"
    program = worker.start(["ddp-launch", "train", ...], cwd=somewhere, RANK="1")
    program.wait_for("batch", limit_s=60)      # the line of its output that holds this
    worker.cut()                               # pull the cable; worker.plug() puts it back
    assert program.wait(limit_s=60) == 2, program.output

A machine is a set of Linux namespaces (network, host name, mounts, processes) without a name, joined
to the others by a bridge in a namespace of its own. So two labs, of two test runs, share nothing; and
when the process that made a lab dies, however it dies, the kernel removes the machines and all that
runs on them: no leftovers. All machines see the same disk: give each a folder of its own.

Needs Linux, root, iproute2, iptables and util-linux: see `missing`.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

IPV4, IPV6 = "10.77.0.{}", "fd77::{}"
_FIRST = 10  # machine i has the addresses 10.77.0.(10 + i) and fd77::(10 + i)
_LIMIT_S = 30  # for what takes milliseconds: ip, iptables, the start of a machine
# Programs import the package of this tree, wherever they run.
_ROOT = Path(__file__).parents[2]


def missing() -> str:
    """What this computer lacks for a lab, in one line; empty where nothing is missing."""
    if sys.platform != "linux":
        return "machines are Linux namespaces: this is " + sys.platform
    if os.geteuid() != 0:
        return "machines are made by root: this user is not"
    tools = [t for t in "ip iptables ip6tables tc unshare nsenter setpriv".split() if not which(t)]
    if tools:
        return f"not installed: {', '.join(tools)} (apt install iproute2 iptables util-linux)"
    tried = subprocess.run([*_UNSHARE, "true"], capture_output=True, text=True, timeout=_LIMIT_S)
    return "" if tried.returncode == 0 else f"no namespaces here: {tried.stderr.strip()}"


def which(tool: str) -> str | None:
    return shutil.which(tool, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


# Ends with the process that called it, and everything inside ends with it.
_UNSHARE = (
    "setpriv --pdeathsig KILL unshare --net --uts --mount --pid --fork --kill-child --mount-proc"
).split()
# Process 1 of a machine: reaps what its parents left, and does nothing else.
_HOLD = "echo ready; exec env --ignore-signal=CHLD sleep infinity"


class _Namespaces:
    """A process that holds fresh namespaces, and how to run something in them."""

    def __init__(self, set_up: str, *arguments: str) -> None:
        self._holder = subprocess.Popen(
            [*_UNSHARE, "sh", "-ec", f"{set_up}\n{_HOLD}", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "ready\n":
            raise RuntimeError(f"a machine could not be made: {set_up!r}, see above")
        self.pid = psutil.Process(self._holder.pid).children()[0].pid

    def remove(self) -> None:
        self._holder.kill()
        self._holder.wait(_LIMIT_S)
        self._holder.stdout.close()

    def network(self, *command: str) -> None:
        """Runs a command on this network, but with this computer's files and processes."""
        done = subprocess.run(
            ["nsenter", f"--net=/proc/{self.pid}/ns/net", *command],
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"


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
        self._switch: _Namespaces | None = None
        self.machines: list[Machine] = []
        self._names = names or [f"m{i}" for i in range(count)]
        self._count = count

    def __enter__(self) -> "Lab":
        try:
            self._switch = _Namespaces("ip link add br0 type bridge; ip link set br0 up")
            for i in range(self._count):
                self.machines.append(Machine(self, self._switch, i, self._names[i]))
            for machine in self.machines:
                machine.write_hosts(
                    {other.name: other.address for other in reversed(self.machines)}
                )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for machine in self.machines:
            machine.end_all()
            machine.namespaces.remove()
        if self._switch is not None:
            self._switch.remove()


class Machine:
    """One machine. `address` is its IPv4 address, or its IPv6 address where that is all it has."""

    def __init__(self, lab: Lab, switch: _Namespaces, number: int, name: str) -> None:
        self.number, self.name, self._switch = number, name, switch
        self.ipv4 = IPV4.format(_FIRST + number) if lab.ipv4 else ""
        self.ipv6 = IPV6.format(_FIRST + number) if lab.ipv6 else ""
        self.address = self.ipv4 or self.ipv6
        self.folder = lab.folder / f"machine{number}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._hosts = self.folder / "hosts"
        self.write_hosts({})
        self._port = f"port{number}"
        self.programs: list[Program] = []
        self.namespaces = _Namespaces(
            'echo "$0" > /proc/sys/kernel/hostname; ip link set lo up; mount --bind "$1" /etc/hosts',
            name,
            str(self._hosts),
        )
        cable = f"{self._port} type veth peer name eth0 netns {self.namespaces.pid}"
        switch.network("ip", "link", "add", *cable.split())
        switch.network("ip", "link", "set", self._port, "master", "br0", "up")
        for address in filter(
            None, (self.ipv4 and self.ipv4 + "/24", self.ipv6 and self.ipv6 + "/64")
        ):
            nodad = ["nodad"] if ":" in address else []
            self.namespaces.network("ip", "address", "add", address, "dev", "eth0", *nodad)
        self.namespaces.network("ip", "link", "set", "eth0", "up")

    def write_hosts(self, names: dict[str, str], localhost: bool = True) -> None:
        """Makes `name -> address` all that this machine's /etc/hosts says, beside localhost."""
        lines = ["127.0.0.1 localhost", "::1 localhost"] if localhost else []
        lines += [f"{address} {name}" for name, address in names.items()]
        self._hosts.write_text("\n".join(lines) + "\n")  # in place: the file is mounted

    def start(self, command: list[str], cwd: Path | None = None, **environment: str) -> "Program":
        """Starts a command here, in `cwd` (default: the machine's folder).

        It gets this process's environment, less what places a rank, and with `environment`. Words
        "ddp-launch", "torchrun" and "python" at its head mean this Python's.
        """
        program = Program(self, command, cwd or self.folder, environment, len(self.programs))
        self.programs.append(program)
        return program

    def run(self, command: list[str], limit_s: float = _LIMIT_S, **environment: str) -> str:
        """Output of a command that must succeed."""
        program = self.start(command, **environment)
        assert program.wait(limit_s) == 0, program.output
        return program.output

    def processes(self) -> list[psutil.Process]:
        """All that runs here, as processes of this computer; process 1 is left out."""
        space = os.readlink(f"/proc/{self.namespaces.pid}/ns/pid")
        found = []
        for process in psutil.process_iter():
            try:
                inside = os.readlink(f"/proc/{process.pid}/ns/pid") == space
                if inside and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (OSError, psutil.NoSuchProcess):
                continue
        return [process for process in found if process.pid != self.namespaces.pid]

    def left(self) -> list[psutil.Process]:
        """What still runs here after the moment that Python's resource tracker takes to follow."""
        return psutil.wait_procs(self.processes(), timeout=_LIMIT_S)[1]

    def end_all(self) -> None:
        """SIGKILL to all that runs here, as when the power fails (`cut` first, and no peer hears)."""
        while running := self.processes():  # again: a process may have started another meanwhile
            _kill(running)
        for program in self.programs:
            program.wait(_LIMIT_S)

    # The network

    def cut(self) -> None:
        """Pulls the machine's cable at the switch: packets vanish, and nobody is told."""
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

    def close_ports(
        self, ports: str = "0:65535", but: int | None = None, how: str = "DROP"
    ) -> None:
        """Lets no new TCP connection in from outside to `ports` ("500:600"), or to any but one.

        how: DROP (packets vanish) or REJECT (the other side is refused at once).
        """
        wanted = ["--dport", ports] if but is None else ["!", "--dport", str(but)]
        refuse = ["--reject-with", "tcp-reset"] if how == "REJECT" else []
        for tool in ("iptables", "ip6tables"):
            rule = [tool, "-A", "INPUT", "-i", "eth0", "-p", "tcp", "--syn", *wanted]
            self.namespaces.network(*rule, "-j", how, *refuse)

    def open_ports(self) -> None:
        """Takes every such rule away."""
        for tool in ("iptables", "ip6tables"):
            self.namespaces.network(tool, "-F", "INPUT")


class Program:
    """A command on a machine; its output, both streams, goes to the file `log`."""

    def __init__(
        self,
        machine: Machine,
        command: list[str],
        cwd: Path,
        environment: dict[str, str],
        number: int,
    ) -> None:
        self.command, self.log = command, machine.folder / f"program{number}.log"
        beside = Path(sys.executable).parent
        head = {"python": [sys.executable, "-u"], "torchrun": [str(beside / "torchrun")]}
        head["ddp-launch"] = [sys.executable, "-u", "-m", "ddp_lib.launch"]
        full = [*head.get(command[0], command[:1]), *command[1:]]
        inside = f"nsenter --target {machine.namespaces.pid} --net --uts --mount --pid -- env -C"
        with open(self.log, "wb") as log:
            self._process = subprocess.Popen(
                [*inside.split(), str(cwd), *full],
                env={**_plain_environment(), **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a machine is nobody's job at a terminal
            )

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, pattern: str, limit_s: float) -> str:
        """The first line of the output in which the regular expression is found, once it is there.

        AssertionError, with the output, where it does not come in time, or the program has ended.
        """
        deadline = time.monotonic() + limit_s
        while True:
            ended = self._process.poll() is not None  # before reading: nothing comes after the end
            for line in self.output.splitlines():
                if re.search(pattern, line):
                    return line
            assert not ended, f"ended without {pattern!r}:\n{self.output}"
            assert time.monotonic() < deadline, f"no {pattern!r} in {limit_s} s:\n{self.output}"
            time.sleep(0.02)

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def wait(self, limit_s: float) -> int:
        """Exit status, -n after signal n. AssertionError, with the output, after `limit_s`."""
        try:
            return self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {limit_s} s:\n{self.output}") from None

    def processes(self) -> list[psutil.Process]:
        """The command's own process, then all that it started, and they."""
        deadline = time.monotonic() + _LIMIT_S
        while not self.ended:  # nsenter, outside, starts the command inside
            found = psutil.Process(self._process.pid).children(recursive=True)
            if found:
                return found
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return []

    def signal(self, number: signal.Signals) -> None:
        """Sends the signal to the command's own process, and to no child."""
        for process in self.processes()[:1]:
            process.send_signal(number)

    def end(self) -> None:
        """SIGKILL to the command and all that it started."""
        _kill(self.processes())
        self.wait(_LIMIT_S)


def _kill(processes: list[psutil.Process]) -> None:
    """SIGKILL; returns when all are gone."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    _, alive = psutil.wait_procs(processes, timeout=_LIMIT_S)
    assert not alive, alive


def _plain_environment() -> dict[str, str]:
    """This process's, without what would place a rank or choose an interface."""
    ours = re.compile(
        "(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|GROUP_RANK|MASTER_.*|OMP_NUM_THREADS|LOGLEVEL"
        "|(SLURM|PET|TORCH|TORCHELASTIC|GLOO|NCCL|DDP_LIB|PMI|OMPI)_.*)"
    )
    kept = {name: value for name, value in os.environ.items() if not ours.fullmatch(name)}
    return {**kept, "PYTHONPATH": str(_ROOT), "PYTHONUNBUFFERED": "1"}
