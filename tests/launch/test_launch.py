"""ddp-launch: the ranks it starts, how it ends with them, and what it refuses."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from ddp_lib.launch import main as launch
from ddp_lib.processes.signals import StopSignal, signals_to_heed

ROOT = Path(__file__).parents[2]
HOST = socket.gethostname()
TRAIN = (sys.executable, "-m", "ddp_lib.launch", "train")
LIMIT_S = 60  # for what takes seconds on an idle machine; torch's agent alone imports for two

# The agent as `ddp-launch train` starts it, around another program than the training.
AGENT = """
import sys
from ddp_lib.launch import main as launch
from ddp_lib.processes.exit_status import as_exit_status
from tests.lab.rank_script import run
launch._LIMIT_S = float(sys.argv[1])
flags = launch.parse(launch.LaunchOptions, sys.argv[3:], "ddp-launch train")
with as_exit_status() as outcome:
    outcome.status = launch.start_agent(flags, 20.0, run, [sys.argv[2]])
sys.exit(outcome.status)
"""
# What every worker below starts with: `note` leaves a file, `wait_for` waits for another's.
WORKER = """
import json, os, signal, sys, time
from pathlib import Path
from ddp_lib.errors import UserError
from ddp_lib.processes.exit_status import as_exit_status
from ddp_lib.processes.signals import StopSignal
here, rank = Path(__file__).parent, int(os.environ["RANK"])
def note(name, text=""):
    (here / "new").mkdir(exist_ok=True)
    path = here / "new" / f"{name}{rank}"
    path.write_text(text)
    path.replace(here / f"{name}{rank}")
def wait_for(name):
    while not (here / name).exists():
        time.sleep(0.02)
def for_ever():
    while True:
        time.sleep(0.05)
"""


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes to end, with all below them, however the test ends."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
        process.wait(LIMIT_S)
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path, started: list[subprocess.Popen[str]]) -> Start:
    """Starts ddp-launch around a worker of these lines."""

    def run(lines: str, *flags: str, limit_s: float = 4.5) -> "subprocess.Popen[str]":
        script = tmp_path / "worker.py"
        script.write_text(WORKER + lines)
        process = subprocess.Popen(
            [sys.executable, "-c", AGENT, str(limit_s), str(script), *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=clean_environment(),
        )
        started.append(process)
        return process

    return run


def clean_environment() -> dict[str, str]:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "LOGLEVEL")
    kept = {k: v for k, v in os.environ.items() if k not in names and not k.startswith("SLURM")}
    return {**kept, "PYTHONPATH": str(ROOT)}


def end(process: "subprocess.Popen[str]") -> tuple[int, str, list[str]]:
    """Exit status, stdout, lines of stderr; the agent has ended by itself."""
    out, err = process.communicate(timeout=LIMIT_S)
    return process.returncode, out, err.splitlines()


def first_line(process: "subprocess.Popen[str]") -> str:
    """What it prints first; a process that prints nothing is ended at the limit."""
    limit = threading.Timer(LIMIT_S, process.kill)
    limit.start()
    try:
        return process.stdout.readline().strip()
    finally:
        limit.cancel()


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ranks(folder: Path, count: int = 2) -> list[psutil.Process]:
    """The ranks, once each has noted its process number."""
    wait_until(lambda: all((folder / f"pid{rank}").exists() for rank in range(count)))
    return [psutil.Process(int((folder / f"pid{rank}").read_text())) for rank in range(count)]


def all_gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=LIMIT_S / 4)
    return not alive


# What it starts


NAMES = """RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR OMP_NUM_THREADS
TORCHELASTIC_RESTART_COUNT""".split()


@pytest.mark.ranks
def test_each_rank_gets_its_place_and_its_share_of_the_cores(start, tmp_path):
    process = start(
        'note("env", json.dumps(dict(os.environ)))\nprint("hello")', "--nproc-per-node", "2"
    )
    status, out, err = end(process)
    cores = max(1, launch.usable_cores() // 2)
    assert (status, err) == (0, [])
    assert out.splitlines() == [
        f"ddp-launch: starting 2 rank(s) on {HOST}, OMP_NUM_THREADS={cores} a rank",
        "hello",
        "hello",
    ]
    for rank in range(2):
        env = json.loads((tmp_path / f"env{rank}").read_text())
        assert [env[name] for name in NAMES] == [
            str(rank), str(rank), "2", "2", "0", "127.0.0.1", str(cores), "0",
        ]  # fmt: skip
        assert 1 <= int(env["MASTER_PORT"]) <= 65535
        # The ranks' store is their own: the agent's would still hold a dead attempt's keys.
        assert env["TORCHELASTIC_USE_AGENT_STORE"] == "False"


@pytest.mark.ranks
def test_a_rank_is_a_fork_that_may_use_gpus_and_has_its_own_name_and_threads(start, tmp_path):
    """CUDA refuses forks of a process that has asked for GPUs, be it only their number."""
    lines = """
import psutil, torch
me = psutil.Process()
said = [torch.cuda._is_in_bad_fork(), me.name(), torch.get_num_threads(), me.ppid()]
note("is", json.dumps(said))
"""
    status, _, err = end(start(lines, "--nproc-per-node", "2"))
    assert (status, err) == (0, [])
    first, second = (json.loads((tmp_path / f"is{rank}").read_text()) for rank in range(2))
    cores = max(1, launch.usable_cores() // 2)
    assert first[:3] == [False, "ddp-rank0", cores] and second[:3] == [False, "ddp-rank1", cores]
    assert first[3] == second[3]


@pytest.mark.ranks
def test_two_agents_meet_at_the_endpoint(start, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ("--nnodes=2", "--nproc-per-node=1", f"--rdzv-endpoint=127.0.0.1:{port}")
    lines = 'note("env", json.dumps(dict(os.environ)))'
    both = [start(lines, *flags) for _ in range(2)]
    assert [end(process)[0::2] for process in both] == [(0, []), (0, [])]
    envs = [json.loads((tmp_path / f"env{rank}").read_text()) for rank in range(2)]
    assert [env["GROUP_RANK"] for env in envs] == ["0", "1"]
    assert {(env["WORLD_SIZE"], env["LOCAL_RANK"]) for env in envs} == {("2", "0")}
    assert {env["MASTER_ADDR"] for env in envs} == {"127.0.0.1"}
    assert len({env["MASTER_PORT"] for env in envs}) == 1


@pytest.mark.ranks
def test_a_restart_is_one_line(start):
    lines = """
if rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    with as_exit_status() as outcome:
        raise UserError("the first time it fails")
    sys.exit(outcome.status)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    for_ever()
"""
    status, _, err = end(start(lines, "--nproc-per-node=2", "--max-restarts=3"))
    assert status == 0
    assert err == [
        f"ddp-launch: rank 1 on {HOST}: the first time it fails; "
        "starting the ranks again, 1 of at most 3 times"
    ]


# How it ends


FAILS = "with as_exit_status() as outcome:\n    {}\nsys.exit(outcome.status)"
# Each: what rank 1 does while rank 0 waits for ever, the status, and the one line.
ENDINGS = {
    "status": ("sys.exit(7)", 7, " ended with status 7; its output stands above"),
    "signal": (
        "os.kill(os.getpid(), signal.SIGKILL)",
        137,
        " died of SIGKILL: killed by hand, or for want of memory",
    ),
    "abort": ("os.abort()", 134, " died of SIGABRT"),
    "stopped": ("sys.exit(143)", 143, " was stopped by SIGTERM"),
    "refused": (FAILS.format('raise UserError("x is 3: give 4")'), 2, ": x is 3: give 4"),
}


@pytest.mark.ranks
@pytest.mark.parametrize(("lines", "expected", "text"), ENDINGS.values(), ids=ENDINGS)
def test_the_first_rank_to_fail_gives_status_and_line(start, tmp_path, lines, expected, text):
    one = "\n".join("    " + line for line in ['wait_for("go")', *lines.splitlines()])
    process = start(
        f'note("pid", str(os.getpid()))\nif rank == 1:\n{one}\nfor_ever()', "--nproc-per-node=2"
    )
    both = ranks(tmp_path)
    (tmp_path / "go").touch()
    status, _, err = end(process)
    assert (status, err) == (expected, [f"ddp-launch: error: rank 1 on {HOST}{text}"])
    assert all_gone(both)


@pytest.mark.ranks
def test_a_traceback_is_printed_once_and_pointed_to(start):
    lines = f"if rank == 1:\n    for_ever()\n{FAILS.format('{}[1]')}"
    status, _, err = end(start(lines, "--nproc-per-node=2"))
    assert status == 1
    assert err[-1] == (
        f"ddp-launch: error: rank 0 on {HOST}: KeyError: 1 (its traceback stands above)"
    )
    assert [line for line in err if "Traceback" in line] == err[:1]
    assert len(err) < 10


# What a rank says when it is the victim of the other's failure, and before the agent stops it.
CONSEQUENCES = {
    "peer gone": FAILS.format('raise RuntimeError("Connection closed by peer [127.0.0.1]:1")'),
    "timeout": FAILS.format('raise RuntimeError("Timed out waiting 1000ms for recv")'),
    "link down": FAILS.format('raise RuntimeError("Application timeout caused pair closure")'),
    "later": FAILS.format('raise UserError("another cause, but later")'),
}


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("consequence", "by_signal"),
    # A death by signal leaves no exact time: an error of another kind within its second wins.
    [(name, by_signal) for name in CONSEQUENCES for by_signal in (False, True)][:-1],
)
def test_the_cause_is_named_not_its_consequence(start, consequence, by_signal):
    # Rank 1 waits until the agent must have seen both, or sees rank 0 first.
    cause = FAILS.format('raise UserError("the cause")')
    cause = 'note("over")\nos.kill(os.getpid(), signal.SIGSEGV)' if by_signal else cause
    tell = cause.replace("sys.exit", 'note("over")\nsys.exit')
    body = f"""
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if rank == 1:
    {tell.replace(chr(10), chr(10) + "    ")}
wait_for("over1")
{CONSEQUENCES[consequence]}
"""
    status, _, err = end(start(body, "--nproc-per-node=2"))
    if by_signal:
        assert (status, err) == (139, [f"ddp-launch: error: rank 1 on {HOST} died of SIGSEGV"])
    else:
        assert (status, err) == (2, [f"ddp-launch: error: rank 1 on {HOST}: the cause"])


# Signals

LEAVES = """
with StopSignal() as stop, stop.deferred():
    note("pid", str(os.getpid()))
    while not stop.requested:
        time.sleep(0.02)
    note("left", str(stop.requested))
    sys.exit(128 + stop.requested)
"""
DEAF = """
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: note("heard"))
note("pid", str(os.getpid()))
for_ever()
"""


@pytest.mark.ranks
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_the_ranks_and_they_leave_in_order(start, tmp_path, number):
    process = start(LEAVES, "--nproc-per-node=2")
    both = ranks(tmp_path)
    process.send_signal(number)
    status, _, err = end(process)
    assert (status, err) == (128 + number, [])
    assert [(tmp_path / f"left{rank}").read_text() for rank in range(2)] == [str(int(number))] * 2
    assert all_gone(both)


@pytest.mark.ranks
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ranks_that_do_not_heed_it_are_ended(start, tmp_path, number):
    process = start(DEAF, "--nproc-per-node=2")
    both = ranks(tmp_path)
    process.send_signal(number)
    _, err = process.communicate(timeout=15)  # torch's own limit is 30 s
    assert (process.returncode, err) == (128 + number, "")
    assert all((tmp_path / f"heard{rank}").exists() for rank in range(2))
    assert all_gone(both)


@pytest.mark.ranks
def test_a_second_ctrl_c_ends_all_at_once(start, tmp_path):
    process = start(DEAF, "--nproc-per-node=2", limit_s=1000)
    both = ranks(tmp_path)
    process.send_signal(signal.SIGINT)
    wait_until(lambda: all((tmp_path / f"heard{rank}").exists() for rank in range(2)))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=15)
    assert (process.returncode, err) == (130, "")
    assert all_gone(both)


@pytest.mark.ranks
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_machines_have_met(started, number):
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
        silent.settimeout(LIMIT_S)
        with silent.accept()[0]:  # blocked in C++ from here on
            process.send_signal(number)
            _, err = process.communicate(timeout=15)
    assert (process.returncode, err) == (128 + number, "")


@pytest.mark.ranks
def test_no_rank_outlives_a_killed_agent(start, tmp_path):
    process = start(LEAVES, "--nproc-per-node=2")
    both = ranks(tmp_path)
    process.kill()
    assert all_gone(both)
    # SIGTERM, by the rank's own watch; or the SIGINT that torch orders for a parent's death.
    assert {(tmp_path / f"left{rank}").read_text() for rank in range(2)} <= {"15", "2"}


# In a rank


def python(code: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-u", "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(),
    )


STOP = "import os, signal, sys, time\nfrom ddp_lib.processes.signals import StopSignal\n"
READY = 'print("ready")'
# Each: what the process does, and the status it has after SIGTERM and within the limit.
STOPS = {
    "at once": (f"with StopSignal() as stop:\n    {READY}\n    time.sleep(1000)", 143, ""),
    "cleans up": (
        "with StopSignal() as stop:\n    try:\n        "
        f"{READY}\n        time.sleep(1000)\n    finally:\n        print('cleaned')",
        143,
        "cleaned",
    ),
    "deferred": (
        f"with StopSignal() as stop, stop.deferred():\n    {READY}\n"
        "    while not stop.requested: time.sleep(0.01)\n    print(stop.requested)",
        0,
        "15",
    ),
    # A mutex that is locked twice waits without end, and runs no Python handler on a signal.
    "inside C": (
        "import ctypes\nlock = ctypes.CDLL(None).pthread_mutex_lock\n"
        "mutex = ctypes.create_string_buffer(64)\nlock(mutex)\n"
        f"with StopSignal(grace_s=0.2) as stop:\n    {READY}\n    lock(mutex)",
        143,
        "",
    ),
    "never looks": (
        f"with StopSignal(grace_s=0.2) as stop, stop.deferred():\n    {READY}\n"
        "    while True: time.sleep(0.01)",
        143,
        "",
    ),
    "too late": (f"with StopSignal() as stop: pass\n{READY}\ntime.sleep(1000)", -15, ""),
    "not the main thread": (
        "import threading\ndef f():\n    with StopSignal() as stop: pass\n"
        "t = threading.Thread(target=f)\nt.start()\nt.join()\n"
        f"{READY}\ntime.sleep(1000)",
        -15,
        "",
    ),
    # A DataLoader ends its forked workers with SIGTERM: not a signal for this process.
    "forked child": (
        "with StopSignal(grace_s=0) as stop:\n    up, tell = os.pipe()\n    child = os.fork()\n"
        "    if not child: os.write(tell, b'up'), time.sleep(1000)\n"
        "    os.read(up, 2)\n    os.kill(child, signal.SIGTERM)\n"
        "    status = os.waitpid(child, 0)[1]\n    time.sleep(0.2)\n"
        f"    assert (status, stop.requested) == (15, 0)\n    {READY}\n    time.sleep(1000)",
        143,
        "",
    ),
}


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="POSIX signals")
@pytest.mark.parametrize(("code", "status", "output"), STOPS.values(), ids=STOPS)
def test_a_rank_leaves_after_a_signal(started, code, status, output):
    process = python(STOP + code)
    started.append(process)
    assert first_line(process) == "ready"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, out.strip(), err) == (status, output, "")


def test_further_signals_do_not_lengthen_the_grace(started):
    process = python(
        STOP
        + f"with StopSignal(grace_s=1) as stop, stop.deferred():\n    {READY}\n    while True:\n"
        "        time.sleep(0.05)\n        os.kill(os.getpid(), signal.SIGINT)"
    )
    started.append(process)
    assert process.communicate(timeout=LIMIT_S)[0] == "ready\n"
    assert process.returncode == 130


def test_handlers_are_given_back():
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    fd = signal.set_wakeup_fd(-1)
    with StopSignal() as stop:
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert stop.requested == 0
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(fd) == -1


def test_nohup_is_respected():
    assert signal.SIGHUP in signals_to_heed()
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signals_to_heed() == [signal.SIGINT, signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, old)


# What it refuses, before torch is loaded

BAD = {
    "no command": ([], "no command"),
    "unknown command": (["tain"], "'tain'"),
    "unknown flag": (["train", "--epoch", "3"], "--epochs"),
    "unknown flag of both": (["train", "--nproc-per-nod", "3"], "--nproc-per-node"),
    "no number": (["train", "--epochs", "many"], "many"),
    "no value": (["train", "--epochs"], "--epochs"),
    "out of range": (["train", "--epochs", "0"], "--epochs is 0"),
    "no such choice": (["train", "--precision", "int4"], "int4"),
    "stray word": (["train", "shapes"], "shapes"),
    "nproc 0": (["train", "--nproc-per-node", "0"], "'0'"),
    "nproc word": (["train", "--nproc-per-node", "two"], "'two'"),
    "nproc negative": (["train", "--nproc-per-node=-1"], "'-1'"),
    "nnodes 0": (["train", "--nnodes", "0"], "'0'"),
    "nnodes range": (["train", "--nnodes", "3:2"], "'3:2'"),
    "no endpoint": (["train", "--nnodes", "2"], "--rdzv-endpoint"),
    "no port": (["train", "--nnodes=2", "--rdzv-endpoint=master"], "'master'"),
    "no host": (["train", "--nnodes=2", "--rdzv-endpoint=:29500"], "':29500'"),
    "bad port": (["train", "--nnodes=2", "--rdzv-endpoint=master:99999"], "'99999'"),
    "port word": (["train", "--nnodes=2", "--rdzv-endpoint=master:http"], "'http'"),
    "bare IPv6": (["train", "--nnodes=2", "--rdzv-endpoint=fd77::10:29500"], "brackets"),
    "half a bracket": (["train", "--nnodes=2", "--rdzv-endpoint=[fd77::1:29500"], "brackets"),
    "restarts": (["train", "--max-restarts=-1"], "-1"),
    "empty id": (["train", "--nproc-per-node=2", "--rdzv-id="], "--rdzv-id"),
    "plot nothing": (["plot"], "RUN_DIR"),
    "plot nowhere": (["plot", "no/such/run"], "no/such/run"),
}


@pytest.mark.parametrize(("args", "named"), BAD.values(), ids=BAD)
def test_a_bad_command_line_is_one_line(args, named, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    assert launch.main(args) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("ddp-launch: error: ") and err.count("\n") == 1 and len(err) < 300
    assert named.lower() in err.lower()
    assert list(tmp_path.iterdir()) == []


FLAGS = """--nnodes --nproc-per-node --rdzv-endpoint --max-restarts --data --epochs
--global-batch-size --run-dir --seed --precision --resume --model --checkpoint-every-s""".split()


@pytest.mark.parametrize(
    ("args", "shown"),
    [
        (["--help"], ["train", "plot"]),
        (["train", "--help"], FLAGS),
        (["plot", "--help"], ["--out"]),
    ],
    ids=["all", "train", "plot"],
)
def test_help_is_quick(args, shown):
    code = (
        "import sys\nfrom ddp_lib.launch.main import main\n"
        f"try:\n    status = main({args})\nexcept SystemExit as leaving:\n    status = leaving.code\n"
        "assert not status\n"
        "assert not {'torch', 'matplotlib', 'pandas'} & set(sys.modules)"
    )
    out, err = python(code).communicate(timeout=LIMIT_S)
    assert err == ""
    words = out.replace(",", " ").split()
    assert [flag for flag in shown if flag not in words] == []


@pytest.mark.ranks
def test_output_that_nobody_reads(start, started, tmp_path):
    """As with `| head`: no traceback, and from the ranks a reason."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "ddp_lib.launch", "plot", "--help"]
    process = subprocess.Popen(command, stdout=write_end, stderr=subprocess.PIPE, text=True)
    started.append(process)
    os.close(write_end)
    _, err = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, err) == (128 + signal.SIGPIPE, "")

    lines = """
with as_exit_status() as outcome:
    print("ready", flush=True)
    wait_for("go")
    print("more", flush=True)
sys.exit(outcome.status)
"""
    process = start(lines)
    while process.stdout.readline() != "ready\n":
        assert process.poll() is None
    process.stdout.close()
    (tmp_path / "go").touch()
    err = process.stderr.read().splitlines()
    assert process.wait(LIMIT_S) == 128 + signal.SIGPIPE
    assert len(err) == 1 and "nothing reads the output any more" in err[0]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("endpoint", "named"),
    [("no-such-host.invalid:29500", "does not resolve"), ("{taken}", "another program")],
    ids=["no name", "another program's port"],
)
def test_an_endpoint_where_nobody_meets_is_named(started, tmp_path, endpoint, named):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = endpoint.format(taken=f"127.0.0.1:{silent.getsockname()[1]}")
        process = subprocess.Popen(
            [*TRAIN, "--nnodes=2", "--rdzv-endpoint", endpoint, "--join-timeout-s", "1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=clean_environment(),
        )
        started.append(process)
        status, _, err = end(process)
    assert status == 2
    assert len(err) == 1 and err[0].startswith("ddp-launch: error: ")
    assert named in err[0] and endpoint.rpartition(":")[0] in err[0]
    assert list(tmp_path.iterdir()) == []


# As one rank, or as an agent

PLACES = {
    "alone": ({}, [], "agent"),
    "docker run -e": ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "m"}, [], "rank"),
    "half of it": ({"MASTER_ADDR": "m"}, [], "rank"),  # refused there, by name
    "flags win": ({"RANK": "0", "WORLD_SIZE": "2"}, ["--nproc-per-node", "2"], "agent"),
    "flags win, torchrun's spelling": ({"RANK": "0"}, ["--nproc_per_node=2"], "agent"),
    "srun": ({"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}, [], "rank"),
    "srun, one task": (
        {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "1"},
        [],
        "agent",
    ),
    "sbatch script": ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, [], "agent"),
}


@pytest.mark.parametrize(("environment", "flags", "expected"), PLACES.values(), ids=PLACES)
def test_who_starts_the_rank(environment, flags, expected, monkeypatch):
    import ddp_lib.train

    for name in list(os.environ):
        if name.startswith("SLURM") or name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    calls: list[tuple[str, list[str]]] = []

    def rank(argv: list[str]) -> int:
        calls.append(("rank", argv))
        return 0

    def agent(options: object, join_timeout_s: float, rank: object, flags: list[str]) -> int:
        calls.append(("agent", flags))
        return 0

    monkeypatch.setattr(ddp_lib.train, "main", rank)
    monkeypatch.setattr(launch, "start_agent", agent)
    train = ["--epochs", "3", "--run-dir=a b"]
    assert launch.main(["train", *train[:2], *flags, *train[2:]]) == 0
    assert calls == [(expected, train)]


def test_plot_prints_what_it_wrote(monkeypatch, capsys):
    import ddp_lib.report.plots

    monkeypatch.setattr(ddp_lib.report.plots, "plot_run", lambda folder, out: (folder, out))
    assert launch.main(["plot", "runs/a"]) == 0
    assert launch.main(["plot", "runs/a", "--out", "b.png"]) == 0
    assert capsys.readouterr().out == "('runs/a', None)\n('runs/a', 'b.png')\n"


# The training itself


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


@pytest.mark.ranks
def test_a_training_is_stopped_resumed_and_finished(started, images_folder, shared_cache, tmp_path):
    folder = tmp_path / "run"
    command = [
        *TRAIN, "--nproc-per-node", "2", "--run-dir", str(folder),
        "--data", str(images_folder), "--data-dir", shared_cache,
        "--model", "tests.lab.models:Plain", "--global-batch-size", "210", "--epochs",
    ]  # fmt: skip

    def train(epochs: int) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [*command, str(epochs)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=clean_environment(),
        )
        started.append(process)
        return process

    process = train(10000)
    log = folder / "rank0.jsonl"
    wait_until(lambda: log.exists() and '"loss"' in log.read_text())
    process.send_signal(signal.SIGINT)
    status, _, err = end(process)
    assert (status, err) == (130, [])
    assert (folder / "checkpoint.pt").exists()
    last = json.loads(log.read_text().splitlines()[-1])
    assert last["event"] == "end"
    status, _, err = end(train(last["step"] // 3 + 1))
    assert (status, err) == (0, [])
    starts = [line for line in map(json.loads, log.read_text().splitlines()) if "start" in line]
    assert [line["step"] for line in starts] == [0, last["step"]]
