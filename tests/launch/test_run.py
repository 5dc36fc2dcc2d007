"""ddp-launch run: any script, as torchrun starts it, and one line that says why it failed."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.lab.own_script import RUN, START
from tests.lab.ports import free_port
from tests.lab.processes import HOST, all_gone, clean_environment, end, start_piped, wait_until

pytestmark = pytest.mark.ranks

Run = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def run(tmp_path: Path, started: list[subprocess.Popen[str]]) -> Run:
    """run(lines, *flags, args=()): starts ddp-launch around a script of these lines, on two ranks."""

    def start(lines: str, *flags: str, args: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
        script = tmp_path / "own.py"
        script.write_text(START + lines)
        flags = ("--nproc-per-node", "2", "--log-dir", str(tmp_path / "logs"), *flags)
        process = start_piped([*RUN, *flags, str(script), *args], tmp_path)
        started.append(process)
        return process

    return start


def logs(tmp_path: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (tmp_path / "logs").glob("*/rank*.log")}


def why(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """The exit status and the only line on stderr, without the log's path, which must exist."""
    status, _, (line,) = end(process)
    line, _, log = line.removeprefix("ddp-launch: error: ").partition("; its log: ")
    assert Path(log).is_file()
    return status, line


PROGRAM = """
from torch.utils.data import DataLoader
if __name__ == "__main__":
    print(sys.argv[1:], Path.cwd() == Path(__file__).parent, sys.flags.isolated)
    print("to stderr", file=sys.stderr)
    join()
    for how in ("fork", "spawn"):
        loader = DataLoader([1, 2, 3], num_workers=1, multiprocessing_context=how, batch_size=None)
        assert list(loader) == [1, 2, 3]
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE OMP_NUM_THREADS GLOO_SOCKET_IFNAME".split()
    note("env", json.dumps([os.environ.get(name) for name in names]))
    print(step().tolist())
    dist.destroy_process_group()
"""


def test_a_script_runs_as_under_torchrun(run, tmp_path):
    status, out, err = end(run(PROGRAM, args=("--nnodes", "7", "x y")))
    assert (status, err) == (0, [])
    first, *lines = out.splitlines()
    assert first.startswith(f"ddp-launch: starting 2 rank(s) on {HOST}, OMP_NUM_THREADS=")
    printed = ["['--nnodes', '7', 'x y'] True 0", "to stderr", "[2.0, 2.0]"]
    for rank in range(2):
        mine = [line for line in lines if line.startswith(f"[rank {rank}] ")]
        assert mine == [f"[rank {rank}] {text}" for text in printed]
        assert logs(tmp_path)[f"rank{rank}.log"].splitlines() == printed
        env = json.loads((tmp_path / f"env{rank}").read_text())
        assert env[:4] == [str(rank), str(rank), "2", "2"]
    assert len(lines) == 6


def test_a_module_is_found_in_the_working_directory(tmp_path):
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "train.py").write_text("import sys\nprint(__name__, __package__, sys.argv[1:])")
    command = [*RUN, "--nproc-per-node=1", "-m", "mine.train", "-m", "x"]
    done = subprocess.run(
        command, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines()[1:] == ["[rank 0] __main__ mine ['-m', 'x']"], done.stderr


def test_output_may_be_shown_of_some_ranks_only(run, tmp_path):
    status, out, _ = end(run('print("hello")', "--local-ranks-filter=1"))
    assert status == 0
    assert set(re.findall(r"\[rank (\d)\]", out)) == {"1"}
    assert logs(tmp_path) == {"rank0.log": "hello\n", "rank1.log": "hello\n"}


# More of them on two machines, in tests/hosts/test_run.py, and as logs alone, in test_failure.py.
FAILS = {
    "in a step": (
        'join()\nfor n in range(9):\n    step()\n    if n == 5 and rank == 1:\n        [].pop()',
        r"rank 1 on {HOST}: IndexError: pop from empty list \(own.py line \d+ in <module>: \[\].pop\(\)\)",
        1,
    ),
    "a crash in C": (
        "if rank == 1:\n    import ctypes\n    ctypes.string_at(0)\nwhile True:\n    time.sleep(0.1)",
        r"rank 1 on {HOST} died of SIGSEGV at own.py line \d+ in <module>: ctypes.string_at\(0\)",
        139,
    ),
    "a wrong flag": (
        'import argparse\nargparse.ArgumentParser(prog="own").parse_args()',
        r"rank [01] on {HOST} ended with status 2; it printed last: own: error: unrecognized .* --what",
        2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", FAILS)
def test_a_failure_is_one_line_that_names_the_first_rank(run, how):
    lines, pattern, want = FAILS[how]
    process = run(lines, args=("--what",))
    status, line = why(process)
    assert re.fullmatch(pattern.replace("{HOST}", re.escape(HOST)), line), line
    assert status == want


def test_a_restart_keeps_the_log_of_the_failed_start(run, tmp_path):
    lines = 'if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":\n    raise OSError("first")\nprint("second")'
    status, _, (line,) = end(run(lines, "--max-restarts=1", "--nproc-per-node=1"))
    assert status == 0
    assert "OSError: first" in line and "starting the ranks again, 1 of at most 1 times" in line
    assert logs(tmp_path)["rank0.restart1.log"] == "second\n"
    assert "OSError: first" in logs(tmp_path)["rank0.log"]


WAITS = 'note("pid", str(os.getpid()))\nwhile True:\n    time.sleep(0.1)'


def ranks_of(tmp_path: Path) -> list[psutil.Process]:
    wait_until(lambda: all((tmp_path / f"pid{rank}").exists() for rank in range(2)))
    return [psutil.Process(int((tmp_path / f"pid{rank}").read_text())) for rank in range(2)]


def test_no_rank_outlives_its_launcher(run, tmp_path):
    process = run(WAITS)
    ranks = ranks_of(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    assert all_gone(ranks)


def test_sigterm_reaches_the_script_and_its_status_is_the_launchers(run, tmp_path):
    lines = 'signal.signal(signal.SIGTERM, lambda *_: (note("told"), sys.exit(0)))\n' + WAITS
    process = run(lines)
    ranks = ranks_of(tmp_path)
    process.terminate()
    assert end(process)[0] == 128 + signal.SIGTERM
    assert all_gone(ranks) and all((tmp_path / f"told{rank}").exists() for rank in range(2))


def test_a_data_loaders_workers_live_until_the_rank_has_saved(run, tmp_path):
    lines = (
        "from torch.utils.data import DataLoader\n"
        "from ddp_lib import StopSignal\n"
        "with StopSignal() as stop:\n"
        "    stop.deferred = True\n"
        "    for number, _ in enumerate(DataLoader(range(10**6), num_workers=1)):\n"
        '        if number == 5:\n            note("pid", str(os.getpid()))\n'
        "        if stop.requested:\n"
        '            time.sleep(1)\n            note("saved")\n            sys.exit(143)\n'
    )
    process = run(lines)
    ranks_of(tmp_path)
    process.terminate()
    assert end(process)[0] == 128 + signal.SIGTERM
    assert all((tmp_path / f"saved{rank}").exists() for rank in range(2))


def test_after_the_grace_period_a_blocked_rank_is_killed(run, tmp_path):
    process = run(f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{WAITS}", "--grace-s", "1")
    ranks = ranks_of(tmp_path)
    process.terminate()
    assert end(process)[0] == 128 + signal.SIGTERM
    assert all_gone(ranks)


def test_stacks_say_where_each_rank_stands(run, tmp_path):
    run(
        'join()\nstep()\nnote("pid", str(os.getpid()))\n'
        "def asleep():\n    time.sleep(600)\nasleep() if rank else step()"
    )
    pids = [f"(process {rank.pid})" for rank in ranks_of(tmp_path)]  # other tests run meanwhile
    command = [sys.executable, "-m", "ddp_lib.launch", "stacks"]

    def seen() -> str:
        done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=60)
        return "\n".join(line for line in done.stdout.splitlines() if any(pid in line for pid in pids))

    wait_until(lambda: "asleep" in seen() and "all_reduce" in seen())
    first, second = seen().splitlines()
    assert re.fullmatch(
        r"rank 0 \(process \d+\): own.py line \d+ in step: dist.all_reduce\(tensor\) \(in all_reduce\)", first
    )
    assert re.match(r"rank 1 \(process \d+\): own.py line \d+ in asleep: time.sleep\(600\)", second)


MEMORY = Path("/sys/fs/cgroup/memory")


@pytest.mark.skipif(
    not os.access(MEMORY, os.W_OK), reason="no control groups of version 1 that this user may make"
)
def test_a_rank_at_its_memory_limit_is_said_to_be_out_of_memory(run, tmp_path):
    group = MEMORY / f"ddp-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(900 << 20))
        process = run(f'if rank == 1:\n    a = b"x" * (2 << 30)\n{WAITS}')
        (group / "cgroup.procs").write_text(str(process.pid))
        status, line = why(process)
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()
    assert line.startswith(f"rank 1 on {HOST} died of SIGKILL: out of memory, as the kernel's counter")
    assert status == 137


# What number 1, which is started with a missing script, with a flag, or with a variable, says; number 0 too.
CANNOT_START = {
    "no script": (["own.py"], {}, "script 'own.py' is not a file here"),
    "no GPU": (["--nproc-per-node=gpu", "own.py"], {}, "this machine has no GPU that torch can use"),
    "no interface": (["own.py"], {"GLOO_SOCKET_IFNAME": "eth9"}, "has no interface 'eth9'"),
}


@pytest.mark.parametrize("master", [True, False], ids=["the master", "another"])
@pytest.mark.parametrize(("words", "variables", "text"), CANNOT_START.values(), ids=CANNOT_START)
def test_a_machine_that_cannot_start_ranks_tells_the_others(
    monkeypatch, tmp_path, started, words, variables, text, master
):
    endpoint = f"--rdzv-endpoint=127.0.0.1:{free_port()}"
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        wrong = number == (0 if master else 1)
        if not (wrong and text.startswith("script")):
            (folder / "own.py").write_text("")
        flags = ["--nnodes=2", endpoint, f"--node-rank={number}", *(words if wrong else ["own.py"])]
        with monkeypatch.context() as patch:
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            for name, value in variables.items() if wrong else ():
                patch.setenv(name, value)
            started.append(start_piped([*RUN, *flags], folder))
    for process in started:
        status, _, lines = end(process)
        [line] = [line for line in lines if "waiting for the other machines" not in line]
        assert status == 2 and text in line


# A signal arrives where torch's own code swallows every Exception: it waits there for the ranks' last output.
SWALLOWS = """
import signal, sys
from contextlib import suppress
from torch.distributed.elastic.multiprocessing.tail_log import TailLog
from ddp_lib.launch.main import main
def stop(log):
    with suppress(Exception):
        signal.raise_signal(signal.SIGTERM)
    true(log)
true, TailLog.stop = TailLog.stop, stop
sys.exit(main(sys.argv[1:]))
"""


def test_a_stop_while_the_output_of_failed_ranks_is_still_read(started, tmp_path):
    (tmp_path / "own.py").write_text(START + 'note("starts")\nsys.exit(3)')
    command = [sys.executable, "-c", SWALLOWS, "run", "--max-restarts=3", "own.py"]
    started.append(process := start_piped(command, tmp_path))
    assert end(process)[::2] == (143, [])
