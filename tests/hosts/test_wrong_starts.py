"""Machines that are started wrongly: one line with the cause on every machine, and nothing left."""

import pytest

TIMEOUT_S = 300
ENDPOINT = "10.77.0.10:29500"
SOON = ("--join-timeout-s", "10")
SQUATTER = """
import socket, sys
server = socket.create_server(("", 29500))
print("listens")
peers = []
while True:
    peer, _ = server.accept()
    peer.sendall(b"220 ready\\r\\n")
    peers.append(peer)
"""
GARBAGE = """
import socket, time
sent = 0
while sent < 20:
    try:
        with socket.create_connection(("10.77.0.10", 29500), timeout=1) as peer:
            peer.sendall(b"GET / HTTP/1.1\\r\\n\\r\\n" * 99 + bytes(range(256)))
        sent += 1
    except OSError:
        time.sleep(0.05)
print("sent")
"""


# A peer that does not come, or a port that is taken, may be there at the next start: another status.
LATER = ("nobody listens", "did not reach", "did not meet", "cannot be opened")


def causes(machines) -> list[str]:
    """Each machine's one line of error, in order; it ended with the status, and left nothing."""
    lines = []
    for machine in machines:
        program = machine.programs[-1]
        program.wait(TIMEOUT_S)
        may_pass = any(text in program.output for text in LATER)
        assert program.wait(TIMEOUT_S) == (75 if may_pass else 2), program.output
        errors = [line for line in program.output.splitlines() if "error:" in line]
        assert len(errors) == 1, program.output
        assert "Traceback" not in program.output
        assert machine.left() == []
        lines += errors
    return lines


def start_all(train, machines, ranks, sizes, *flags, master="10.77.0.10") -> None:
    for machine, rank, size in zip(machines, ranks, sizes, strict=True):
        train(machine, *SOON, *flags, rank=rank, size=size, master=master)


# Each: ranks and WORLD_SIZE of the machines from m0 on, and what each one's line holds.
FOUR = {
    "master absent": ([None, 1], [2, 2], [None, "nobody listens on MASTER_ADDR=10.77.0.10"]),
    "a machine missing": ([0, 1, None], [3, 3, 3], ["rank(s) 2 of 3 did not reach"] * 2 + [None]),
    "WORLD_SIZE too small": ([0, 1], [2, 1], ["rank(s) 1 of 2", "RANK=1 is out of range"]),
    "WORLD_SIZE too large": ([0, 1], [3, 2], ["WORLD_SIZE="] * 2),
    "one number twice": ([0, 1, 1], [3, 3, 3], ["RANK=1 is taken by another process: it is set"] * 3),
}  # fmt: skip


@pytest.mark.parametrize(("ranks", "sizes", "named"), FOUR.values(), ids=FOUR)
def test_wrong_variables_are_named_on_every_machine(make_lab, train, ranks, sizes, named):
    machines = make_lab(len(ranks)).machines
    started = [machine for machine, rank in zip(machines, ranks, strict=True) if rank is not None]
    for machine in started:
        number = machine.number
        train(machine, *SOON, rank=ranks[number], size=sizes[number], master="10.77.0.10")
    for machine, line in zip(started, causes(started), strict=True):
        assert named[machine.number] in line


def test_rank_0_on_two_machines(make_lab, train):
    machines = make_lab(2).machines
    start_all(train, machines, [0, 0], [2, 2])
    for line in causes(machines):
        assert "RANK=0 is set on m0, which has MASTER_ADDR=10.77.0.10" in line


def test_the_masters_port_is_another_programs(make_lab, train):
    machines = make_lab(2).machines
    machines[0].start(["python", "-c", SQUATTER]).wait_for("listens", TIMEOUT_S)
    start_all(train, machines, [0, 1], [2, 2])
    squatter = machines[0].programs[0]
    for machine in machines:
        machine.programs[-1].wait(TIMEOUT_S)
    squatter.end()
    first, second = causes(machines)
    assert "MASTER_PORT=29500 cannot be opened" in first
    assert "answers, but not as a PyTorch store" in second


def test_garbage_on_the_masters_port_harms_nobody(make_lab, train):
    master, worker, stray = make_lab(3).machines
    noise = stray.start(["python", "-c", GARBAGE])
    first = train(master, rank=0, master="m0")
    noise.wait_for("sent", TIMEOUT_S)
    second = train(worker, rank=1, master="m0")
    assert [program.wait(TIMEOUT_S) for program in (first, second)] == [0, 0], first.output


# Each: each machine's own flags, and what its line holds.
LAUNCHED = {
    "a machine missing": ([[]], ["of 2 came 1, m0 (10.77.0.10)"]),
    "--nnodes differ": ([[], ["--nnodes=3"]], ["--nnodes is"] * 2),
    "one number twice": ([["--node-rank=0"], ["--node-rank=0"]], [None, "10.77.0.10:29500 is no address"]),
    "one number twice, not 0": (
        [["--node-rank=0", "--nnodes=3"], ["--node-rank=1", "--nnodes=3"], ["--node-rank=1", "--nnodes=3"]],
        ["number 1 is taken"] * 3,
    ),
    "a flag differs": ([[], ["--lr=0.3"]], ["--lr is "] * 2),
}  # fmt: skip


@pytest.mark.parametrize(("flags", "named"), LAUNCHED.values(), ids=LAUNCHED)
def test_a_wrong_launch_is_named_on_every_machine(make_lab, train, flags, named):
    machines = make_lab(len(flags)).machines
    for machine, own in zip(machines, flags, strict=True):
        line = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-endpoint", ENDPOINT, *SOON, *own]
        train(machine, *line)
    for line, expected in zip(causes(machines), named, strict=True):
        assert (expected or "of 2 came 1, m0") in line
