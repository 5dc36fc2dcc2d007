"""How ddp-launch ends if a rank fails: its status, and one line with the cause."""

import os
import signal
import subprocess
import sys

import pytest

from tests.lab.agent import FAILS, ranks
from tests.lab.processes import HOST, TIMEOUT_S, all_gone, end

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
    of_rank_1 = "\n".join("    " + line for line in ['wait_for("go")', *lines.splitlines()])
    process = start(
        f'note("pid", str(os.getpid()))\nif rank == 1:\n{of_rank_1}\nfor_ever()',
        "--nproc-per-node=2",
    )
    both = ranks(tmp_path)
    (tmp_path / "go").touch()
    status, _, err = end(process)
    assert (status, err[-1]) == (expected, f"ddp-launch: error: rank 1 on {HOST}{text}")
    assert all_gone(both)
    if "abort" in lines:  # above it stand the stacks
        assert err[0] == "Fatal Python error: Aborted" and any("most recent call" in line for line in err)
    else:
        assert len(err) == 1


@pytest.mark.ranks
def test_a_traceback_is_printed_once_and_pointed_to(start):
    lines = f"if rank == 1:\n    for_ever()\n{FAILS.format('{}[1]')}"
    status, _, err = end(start(lines, "--nproc-per-node=2"))
    assert status == 2  # before a first step, so it would come again
    assert err[-1] == (f"ddp-launch: error: rank 0 on {HOST}: KeyError: 1 (its traceback stands above)")
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
        assert (status, err[-1]) == (139, f"ddp-launch: error: rank 1 on {HOST} died of SIGSEGV")
    else:
        assert (status, err) == (2, [f"ddp-launch: error: rank 1 on {HOST}: the cause"])


@pytest.mark.ranks
def test_output_that_nobody_reads(start, started, tmp_path):
    """As with `| head`: no traceback, and from the ranks a reason."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "ddp_lib.launch", "plot", "--help"]
    process = subprocess.Popen(command, stdout=write_end, stderr=subprocess.PIPE, text=True)
    started.append(process)
    os.close(write_end)
    _, err = process.communicate(timeout=TIMEOUT_S)
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
    assert process.wait(TIMEOUT_S) == 128 + signal.SIGPIPE
    assert len(err) == 1 and "nothing reads the output any more" in err[0]
