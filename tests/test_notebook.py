"""run_ranks and run_nodes: ranks from a cell, their output, their failures, and none left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from ddp_lib import RankError, UserError, World, run_nodes, run_ranks

pytestmark = pytest.mark.ranks
LIMIT_S = 60.0


def ranks_left() -> list[psutil.Process]:
    """Processes below this one, but for the fork server and Python's resource tracker."""
    return [
        p
        for p in psutil.Process().children(recursive=True)
        if p.ppid() != os.getpid() or "forkserver" not in " ".join(p.cmdline())
        if "resource_tracker" not in " ".join(p.cmdline())
    ]


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    assert ranks_left() == []


def identity() -> tuple:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    return tuple(os.environ[name] for name in names)


def test_results_come_in_rank_order_with_torchruns_environment():
    assert run_ranks(identity, 3, timeout_s=LIMIT_S) == [
        (str(rank), str(rank), "3", "3", "127.0.0.1") for rank in range(3)
    ]


def summed(factor: float) -> torch.Tensor:
    dist.init_process_group("gloo")
    value = torch.full((2,), factor * dist.get_rank())
    dist.all_reduce(value)
    return value


@pytest.mark.parametrize("nproc", [1, 2, 4])
def test_collectives_by_plain_torch(nproc):
    results = run_ranks(summed, nproc, 2.0, timeout_s=LIMIT_S)
    assert [r.tolist() for r in results] == [[2.0 * sum(range(nproc))] * 2] * nproc


def test_many_launches_after_each_other():
    for _ in range(20):
        assert len(run_ranks(summed, 2, 1.0, timeout_s=LIMIT_S)) == 2


def by_world() -> tuple[int, int]:
    with World.join() as world:
        return world.rank, int(world.sum(torch.ones(1)))


def test_world_joins_as_it_is():
    assert run_ranks(by_world, 2, timeout_s=LIMIT_S) == [(0, 2), (1, 2)]


def test_a_closure_and_its_environment_travel(monkeypatch, tmp_path):
    monkeypatch.setenv("FROM_THE_NOTEBOOK", "yes")
    monkeypatch.chdir(tmp_path)
    number = 5
    got = run_ranks(
        lambda: (number, os.environ["FROM_THE_NOTEBOOK"], os.getcwd()), 1, timeout_s=LIMIT_S
    )
    assert got == [(5, "yes", str(tmp_path))]


def chatty() -> None:
    rank = os.environ["RANK"]
    print("out", rank)
    print("err", rank, file=sys.stderr)
    os.write(1, f"raw {rank}\n".encode())
    print("no newline", end="")


def test_output_comes_in_rank_order_with_the_rank_in_front(capsys):
    run_ranks(chatty, 2, timeout_s=LIMIT_S)
    want = [
        f"[rank {r}] {w}" for r in "01" for w in (f"out {r}", f"err {r}", f"raw {r}", "no newline")
    ]
    assert capsys.readouterr().out.splitlines() == want


def test_the_debug_level_of_the_environment_holds(monkeypatch):
    def level() -> str:
        return str(dist.get_debug_level().name)

    assert run_ranks(level, 1, timeout_s=LIMIT_S) == ["OFF"]
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "DETAIL")
    assert run_ranks(level, 1, timeout_s=LIMIT_S) == ["DETAIL"]


def test_a_rank_imports_nothing_to_wrap_a_model_in_ddp():
    def imported() -> int:
        before = set(sys.modules)
        dist.init_process_group("gloo")
        torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
        return len(set(sys.modules) - before)

    assert run_ranks(imported, 2, timeout_s=LIMIT_S) == [0, 0]


def test_spawn_serves_where_there_is_no_fork_server(monkeypatch):
    import multiprocessing

    from ddp_lib.notebook import rank_pool as local_ranks
    from ddp_lib.processes import forkserver

    def spawn():
        return multiprocessing.get_context("spawn")

    monkeypatch.setattr(local_ranks, "context", spawn)
    monkeypatch.setattr(forkserver, "context", spawn)
    assert [r.tolist() for r in run_ranks(summed, 2, 1.0, timeout_s=LIMIT_S)] == [[1.0, 1.0]] * 2


def fails_on_one() -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        raise ValueError("on purpose")
    dist.barrier()


def test_an_exception_names_the_rank_and_the_own_line():
    with pytest.raises(RankError) as caught:
        run_ranks(fails_on_one, 3, timeout_s=LIMIT_S)
    assert caught.value.rank == 1
    first, *lines = str(caught.value).splitlines()
    assert first == "rank 1: ValueError: on purpose"
    assert len(lines) == 1 and 'raise ValueError("on purpose")' in lines[0]


def mismatched() -> None:
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(3 + 1000 * dist.get_rank()))


def test_a_death_by_a_signal(capsys):
    with pytest.raises(RankError, match=r"rank \d: died of SIGABRT"):
        run_ranks(mismatched, 2, timeout_s=LIMIT_S)


def killed() -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_a_killed_rank_is_the_cause_and_not_its_peer():
    with pytest.raises(RankError, match="rank 0: died of SIGKILL"):
        run_ranks(killed, 2, timeout_s=LIMIT_S)


def hangs() -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        dist.barrier()
    else:
        while True:
            pass


def test_a_hang_says_where_each_rank_stands():
    with pytest.raises(RankError) as caught:
        run_ranks(hangs, 2, timeout_s=3)
    text = str(caught.value)
    assert text.startswith("still running after 3 s\nrank 0 is in barrier\n")
    assert "dist.barrier()" in text and "rank 1 runs its own code" in text


def test_what_cannot_work_is_refused():
    import threading

    lock = threading.Lock()
    for call, says in [
        (lambda: run_ranks(identity, 0), "nproc is 0"),
        (lambda: run_ranks(identity, 2, timeout_s=0), "timeout_s is 0"),
        (lambda: run_ranks(lambda: lock, 1), "cannot be sent"),
    ]:
        with pytest.raises(UserError, match=says) as refused:
            call()
        assert "\n" not in str(refused.value)


def unsendable():
    import threading

    return threading.Lock()


def test_a_result_that_cannot_be_sent():
    with pytest.raises(RankError, match="rank 0: TypeError: what the function returned"):
        run_ranks(unsendable, 1, timeout_s=LIMIT_S)


def leaves_a_ddp_model() -> float:
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    net = DistributedDataParallel(torch.nn.Linear(50, 50))
    for _ in range(3):
        net(torch.ones(4, 50)).sum().backward()
    return float(net.module.weight.grad.sum())


def test_a_ddp_model_left_in_the_function_does_not_abort_at_exit():
    for _ in range(12):
        run_ranks(leaves_a_ddp_model, 2, timeout_s=LIMIT_S)


PROGRAM = """
import faulthandler, os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has it ignored
faulthandler.dump_traceback_later(50)  # where it stands, should it not end
from ddp_lib import run_ranks

def forever():
    import torch.distributed as dist
    dist.init_process_group("gloo")
    dist.barrier()
    print("ready", flush=True)
    time.sleep(600)

try:
    run_ranks(forever, 2, timeout_s=300)
except KeyboardInterrupt:
    import psutil
    left = [p for p in psutil.Process().children(recursive=True) if "forkserver" not in " ".join(p.cmdline())]
    left = [p for p in left if "resource_tracker" not in " ".join(p.cmdline())]
    print("interrupted, left:", len(left), flush=True)
    sys.exit(130)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupt_or_the_death_of_the_kernel_leaves_no_rank(tmp_path, how):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "[rank 0] ready\n"
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 3  # the fork server and two ranks
    process.send_signal(how)
    rest, _ = process.communicate(timeout=LIMIT_S)
    if how == signal.SIGINT:
        assert process.returncode == 130 and "interrupted, left: 0" in rest
    _, alive = psutil.wait_procs(family, timeout=LIMIT_S)
    assert alive == []


CELLS = [
    "from ddp_lib import run_ranks, RankError",
    """
    def hello():
        import torch, torch.distributed as dist
        dist.init_process_group("gloo")
        value = torch.ones(1)
        dist.all_reduce(value)
        print("sum", int(value))
        return dist.get_rank()

    run_ranks(hello, 2)
    """,
    """
    def oops():
        import os
        if os.environ["RANK"] == "1":
            raise KeyError("x")

    run_ranks(oops, 2)
    """,
]


def test_in_a_real_kernel(tmp_path, monkeypatch):
    """As under nbval: the output is in the cell, and the error is one short text."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(textwrap.dedent(c).strip()) for c in CELLS]
    monkeypatch.setenv("PYTEST_CURRENT_TEST", "x")
    client = NotebookClient(notebook, timeout=int(LIMIT_S), allow_errors=True)
    client.execute(cwd=str(tmp_path))
    outputs = [cell.outputs for cell in notebook.cells]
    text = "".join(o["text"] for o in outputs[1] if o["output_type"] == "stream")
    assert text == "[rank 0] sum 2\n[rank 1] sum 2\n"
    assert outputs[1][-1]["data"]["text/plain"] == "[0, 1]"
    (error,) = outputs[2]
    assert error["ename"] == "RankError"
    assert error["evalue"] == "rank 1: KeyError: 'x'\n  line 4 in oops: raise KeyError(\"x\")"
    assert len(error["traceback"]) == 1


def test_nodes_run_the_command_with_their_numbers(tmp_path):
    code = (
        "import sys, os; print(*sys.argv[1:], os.environ['NODE']); sys.exit(int(sys.argv[1]) * 3)"
    )
    command = [sys.executable, "-c", code, "{node}", "{nnodes}", "{endpoint}"]
    nodes = run_nodes(command, 2, timeout_s=LIMIT_S, log_dir=tmp_path, env={"NODE": "n{node}"})
    assert [n.returncode for n in nodes] == [0, 3]
    first, second = (n.output.split() for n in nodes)
    assert first[0] == "0" and second[0] == "1" and first[1] == second[1] == "2"
    assert first[2] == second[2] and first[2].startswith("127.0.0.1:")
    assert (first[3], second[3]) == ("n0", "n1")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["node0.log", "node1.log"]


def test_nodes_that_do_not_end_are_ended_with_their_children():
    child = "import time; time.sleep(600)"
    code = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', sys.argv[1]], "
        "start_new_session=True); print(p.pid, flush=True); p.wait()"
    )
    nodes = run_nodes([sys.executable, "-c", code, child], 2, timeout_s=2)
    assert [n.returncode for n in nodes] == [None, None]
    for node in nodes:
        pid = int(node.output)
        # What is left of an ended process until its new parent takes note is no process.
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_an_unknown_command_is_named():
    with pytest.raises(UserError, match="no-such-command"):
        run_nodes(["no-such-command"], 2)


def test_two_agents_make_one_job(tmp_path):
    """The rehearsal of the course: torchrun as two machines would run it."""
    script = tmp_path / "job.py"
    script.write_text(
        "from ddp_lib import World\nimport torch\n"
        "with World.join(join_timeout_s=60, log=lambda line: None) as world:\n"
        "    print('node', world.node, 'sum', int(world.sum(torch.ones(1))))\n"
    )
    command = (
        "torchrun --nnodes {nnodes} --nproc-per-node 1 --rdzv-backend c10d "
        "--rdzv-endpoint {endpoint} --local-addr 127.0.0.1"
    )
    started = time.monotonic()
    nodes = run_nodes([*command.split(), str(script)], 2, timeout_s=LIMIT_S)
    assert [n.returncode for n in nodes] == [0, 0], nodes[0].output
    assert time.monotonic() - started < LIMIT_S
    lines = sorted(line for n in nodes for line in n.output.splitlines() if line.startswith("node"))
    assert lines == ["node 0 sum 2", "node 1 sum 2"]
