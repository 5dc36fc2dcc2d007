"""Fresh Linux namespaces, held by a process, and how to run something in them."""

import os
import shutil
import subprocess
import sys

import psutil

TIMEOUT_S = 30  # for what takes milliseconds: ip, iptables, the start of a machine


def missing() -> str:
    """What this computer lacks for a lab, in one line; empty if nothing is missing."""
    if sys.platform != "linux":
        return "machines are Linux namespaces: this is " + sys.platform
    if os.geteuid() != 0:
        return "machines are made by root: this user is not"
    tools = [t for t in "ip iptables ip6tables tc unshare nsenter setpriv".split() if not which(t)]
    if tools:
        return f"not installed: {', '.join(tools)} (apt install iproute2 iptables util-linux)"
    tried = subprocess.run([*UNSHARE, "true"], capture_output=True, text=True, timeout=TIMEOUT_S)
    return "" if tried.returncode == 0 else f"no namespaces here: {tried.stderr.strip()}"


def which(tool: str) -> str | None:
    return shutil.which(tool, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


# Ends with the process that called it, and everything inside ends with it.
UNSHARE = (
    "setpriv --pdeathsig KILL unshare --net --uts --mount --pid --fork --kill-child --mount-proc"
).split()

# Process 1 of a machine: reaps what its parents left, and does nothing else.
HOLD = "echo ready; exec env --ignore-signal=CHLD sleep infinity"


class Namespaces:
    """A process that holds fresh namespaces, and how to run something in them."""

    def __init__(self, set_up: str, *arguments: str) -> None:
        self._holder = subprocess.Popen(
            [*UNSHARE, "sh", "-ec", f"{set_up}\n{HOLD}", *arguments],
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
        self._holder.wait(TIMEOUT_S)
        self._holder.stdout.close()

    def network(self, *command: str) -> None:
        """Runs a command on this network, but with this computer's files and processes."""
        done = subprocess.run(
            ["nsenter", f"--net=/proc/{self.pid}/ns/net", *command],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
