"""ddp-launch run on two machines: they are compared before the ranks start, and a failure is the same line on
both."""

import re

import pytest

from tests.lab.own_script import START

TIMEOUT_S = 120
ENDPOINT = "10.77.0.10:29500"
# Another version of torch or Python, GPUs, another model: the machines share this computer's.
PATCHED = """
import sys
from ddp_lib.launch import machines
from ddp_lib.launch.main import main
true = machines.describe_machine
machines.describe_machine = lambda *args: change(true(*args))
def change(machine):
    {}
    return machine
sys.exit(main(sys.argv[1:]))
"""
TRAINS = "join()\nimport helper\nprint(step().tolist())\ndist.destroy_process_group()\n"


def start(
    machine,
    lines: str,
    *flags: str,
    args: tuple[str, ...] = (),
    patch: str = "",
    endpoint: str = ENDPOINT,
    helper: str = "VALUE = 1\n",
):
    """Starts the script of these lines on a machine, from a copy in the machine's own folder."""
    (machine.folder / "own.py").write_text(START + lines)
    if helper:
        (machine.folder / "helper.py").write_text(helper)
    command = ["python", "-c", PATCHED.format(patch)] if patch else ["ddp-launch"]
    flags = ("--nnodes=2", "--nproc-per-node=1", f"--rdzv-endpoint={endpoint}", "--join-timeout-s=20", *flags)
    return machine.start([*command, "run", *flags, "own.py", *args])


def outcome(program) -> tuple[int, str]:
    """The exit status, and the only line of the launcher's own errors, without the log's path."""
    status = program.wait(TIMEOUT_S)
    lines = [line for line in program.output.splitlines() if line.startswith("ddp-launch: error: ")]
    assert len(lines) == 1, program.output
    return status, lines[0].removeprefix("ddp-launch: error: ").partition("; its log: ")[0]


def test_a_script_trains_and_a_name_may_mean_ipv6_on_one_machine_and_ipv4_on_the_other(make_lab):
    machines = make_lab(2, ipv4=True, ipv6=True).machines
    machines[0].write_hosts({machine.name: machine.ipv6 for machine in machines})
    programs = [start(machine, TRAINS, endpoint="m0:29500") for machine in reversed(machines)][::-1]
    for rank, program in enumerate(programs):  # rank 0 is on the master, though it was started last
        assert program.wait(TIMEOUT_S) == 0, program.output
        assert f"[rank {rank}] [2.0, 2.0]" in program.output.splitlines()
        assert "error" not in program.output


def test_the_four_variables_make_each_process_a_machine_of_one_rank(make_lab):
    machines = make_lab(2, names=["box", "box"]).machines
    programs = []
    for rank, machine in enumerate(machines):
        (machine.folder / "own.py").write_text(START + TRAINS.replace("import helper\n", ""))
        four = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "10.77.0.10", "MASTER_PORT": "29500"}
        programs.append(machine.start(["ddp-launch", "run", "--max-restarts=1", "own.py"], **four))
    for rank, program in enumerate(programs):
        assert program.wait(TIMEOUT_S) == 0, program.output
        assert f"[rank {rank}] [2.0, 2.0]" in program.output.splitlines()


# More of them, without machines, in tests/launch/test_machines.py.
UNLIKE = {
    "one character of the script": (
        {"lines": TRAINS.replace("import helper", "import helper ")},
        "own.py differs between m1 and m0: copy the same files to every machine, or leave this out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", UNLIKE)
def test_machines_that_differ_say_so_on_both_and_start_no_rank(make_lab, how):
    changes, text = UNLIKE[how]
    machines = make_lab(2).machines
    programs = [start(machines[0], TRAINS), start(machines[1], **{"lines": TRAINS, **changes})]
    for program in programs:
        status, line = outcome(program)
        assert line.startswith(text) and status == 2
        assert "[rank" not in program.output


def test_no_check_leaves_the_comparison_out(make_lab):
    machines = make_lab(2).machines
    values = zip(machines, ("VALUE = 1\n", "VALUE = 2\n"), strict=True)
    for program in [start(m, "import helper", "--no-check", helper=helper) for m, helper in values]:
        assert program.wait(TIMEOUT_S) == 0, program.output


def test_other_gpus_are_a_line_and_it_goes_on(make_lab):
    machines = make_lab(2).machines
    patches = [f'machine.update(gpus=2, ranks=1, model="{model}")' for model in ("H100", "A100")]
    programs = [start(m, "", patch=patch) for m, patch in zip(machines, patches, strict=True)]
    for program in programs:
        assert program.wait(TIMEOUT_S) == 0, program.output
        assert "the machines' GPUs differ: m0 has 2 x H100, m1 has 2 x A100" in program.output


def test_a_closed_port_is_named_before_the_ranks_start(make_lab):
    machines = make_lab(2).machines
    machines[1].close_ports(but=29500)
    programs = [start(machine, TRAINS) for machine in machines]
    for program in programs:
        status, line = outcome(program)
        assert line.startswith("m0 reaches the master, but its connection to m1 at 10.77.0.11, port ")
        assert "gets no answer" in line and status == 2
        assert "[rank" not in program.output


# What rank 1, on machine m1, does; the line on both machines; the statuses of m0 and of m1.
FAILS = {
    "raises before the first collective": (
        'if rank == 1:\n    raise ValueError("no data")\ntime.sleep(600)',
        r"rank 1 on m1: ValueError: no data \(own.py line \d+ in <module>: raise ValueError\(.no data.\)\)",
        1,
    ),
    "lacks a package": (
        "if rank == 1:\n    import nothing_there\ntime.sleep(600)",
        r"rank 1 on m1: ModuleNotFoundError: No module named 'nothing_there' \(own.py line \d+ .*",
        2,
    ),
    "raises in its last line": (
        "join()\nstep()\nassert rank == 0",
        r"rank 1 on m1: AssertionError \(own.py line \d+ in <module>: assert rank == 0\)",
        1,
    ),
    "is killed": (
        "join()\nstep()\nif rank == 1:\n    os.kill(os.getpid(), signal.SIGKILL)\nstep()",
        r"rank 1 on m1 died of SIGKILL: .*",
        137,
    ),
    "hangs": (
        "join(4)\nstep()\nif rank == 1:\n    time.sleep(600)\nstep()",
        r"rank 1 on m1 is at own.py line \d+ in <module>: time.sleep\(600\), while others waited for it",
        75,
    ),
    "ends while the other waits": (
        "join()\nstep()\nif rank == 1:\n    os._exit(0)\nstep()",
        r"rank 1 on m1 ended with status 0, while others waited for it",
        75,
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", FAILS)
def test_both_machines_name_the_rank_that_was_first(make_lab, how):
    lines, pattern, status = FAILS[how]
    machines = make_lab(2).machines
    programs = [start(machine, lines) for machine in machines]
    for program in programs:
        got, line = outcome(program)
        assert re.fullmatch(pattern, line), line
        assert got in (status, 75)
    assert all(machine.left() == [] for machine in machines)
