"""A SLURM of one partition, on machines of a lab: slurmctld on the first, a slurmd on each."""

import os
import re
import secrets
import shutil
import subprocess
import time
from pathlib import Path

from tests.lab.machines import Lab, Machine
from tests.lab.program import Program

TIMEOUT_S = 120
ENDS = "COMPLETED FAILED CANCELLED TIMEOUT NODE_FAIL".split()
_TOOLS = "munged slurmctld slurmd sbatch srun scontrol squeue sinfo".split()
_CONF = """
ClusterName=lab
SlurmctldHost={master}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it starts.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
PropagateResourceLimits=NONE
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SlurmdTimeout=10
KillWait=5
MinJobAge=3600
"""


def missing() -> str:
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    lacks = [tool for tool in _TOOLS if not shutil.which(tool, path=path)]
    return f"not installed: {' '.join(lacks)} (apt install slurm-wlm munge)" if lacks else ""


class Slurm:
    """The daemons run inside `with`; `submit` gives a job's number."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.folder = lab, folder
        self.master = lab.machines[0]
        self._munged: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Slurm":
        (self.folder / "state").mkdir(parents=True)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        self.folder.chmod(0o755)
        files = {
            "key-file": key,
            "socket": self.folder / "munge.socket",
            "pid-file": self.folder / "munged.pid",
            "log-file": self.folder / "munged.log",
            "seed-file": self.folder / "munged.seed",
        }
        options = [f"--{name}={path}" for name, path in files.items()]
        # One for all machines: a socket is found by its path. --force: a folder that others can write.
        self._munged = subprocess.Popen(["/usr/sbin/munged", "--foreground", "--force", *options])
        nodes = "".join(
            f"NodeName={m.name} NodeAddr={m.address} CPUs=1 RealMemory=1000 State=UNKNOWN\n"
            for m in self.lab.machines
        )
        names = ",".join(m.name for m in self.lab.machines)
        conf = _CONF.format(master=self.master.name, address=self.master.address, folder=self.folder)
        partition = f"PartitionName=lab Nodes={names} Default=YES MaxTime=UNLIMITED State=UP\n"
        (self.folder / "slurm.conf").write_text(conf + nodes + partition)
        self._start(self.master, "slurmctld")
        for machine in self.lab.machines:
            self.start_node(machine)
        self.wait_until_idle()
        return self

    def __exit__(self, *_: object) -> None:
        for machine in self.lab.machines:
            machine.end_all()
        if self._munged is not None:
            self._munged.terminate()
            self._munged.wait(TIMEOUT_S)

    def _start(self, machine: Machine, daemon: str, *options: str) -> Program:
        command = [f"/usr/sbin/{daemon}", "-D", *options]
        return machine.start(command, SLURM_CONF=str(self.folder / "slurm.conf"))

    def start_node(self, machine: Machine) -> None:
        (self.folder / f"spool-{machine.name}").mkdir(exist_ok=True)
        self._start(machine, "slurmd", "-N", machine.name)

    def run(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """Output of a command on the first machine, which must succeed."""
        program = self.master.start(
            list(command), cwd=cwd, SLURM_CONF=str(self.folder / "slurm.conf"), **environment
        )
        assert program.wait(TIMEOUT_S) == 0, program.output
        return program.output

    def refused(self, *command: str) -> str:
        """Output of a command on the first machine, which must fail."""
        program = self.master.start(list(command), SLURM_CONF=str(self.folder / "slurm.conf"))
        assert program.wait(TIMEOUT_S) != 0, program.output
        return program.output

    def wait_until_idle(self) -> None:
        count = len(self.lab.machines)
        self._wait(lambda: self._try("sinfo", "-hNo", "%t").split() == ["idle"] * count, "sinfo")

    def submit(self, *words: str, cwd: Path, **environment: str) -> str:
        """`sbatch` in the folder `cwd`; the job's number."""
        output = self.run("sbatch", *words, cwd=cwd, **environment)
        match = re.search(r"Submitted batch job (\d+)", output)
        assert match, output
        return match[1]

    def state(self, job: str) -> str:
        match = re.search(r"JobState=(\S+)", self.run("scontrol", "show", "job", job))
        assert match
        return match[1]

    def wait_for_state(self, job: str, *states: str, timeout_s: float = 3 * TIMEOUT_S) -> str:
        self._wait(lambda: self.state(job) in states, f"scontrol show job {job}", timeout_s)
        return self.state(job)

    def _try(self, *command: str) -> str:
        program = self.master.start(list(command), SLURM_CONF=str(self.folder / "slurm.conf"))
        program.wait(TIMEOUT_S)
        return program.output

    def _wait(self, done, what: str, timeout_s: float = TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not done():
            assert time.monotonic() < deadline, self._try(*what.split())
            time.sleep(0.3)


def wait_for_text(path: Path, pattern: str, timeout_s: float = 2 * TIMEOUT_S, count: int = 1) -> None:
    """Returns when the regular expression is found `count` times in the file."""
    deadline = time.monotonic() + timeout_s
    while True:
        text = path.read_text(errors="replace") if path.exists() else ""
        if len(re.findall(pattern, text)) >= count:
            return
        assert time.monotonic() < deadline, f"no {pattern!r} x {count} in {path}:\n{text}"
        time.sleep(0.1)
