"""run_nodes: one command as several machines would run it."""

import sys
import time

import psutil
import pytest

from ddp_lib import UserError, run_nodes
from tests.lab.ranks import TIMEOUT_S

pytestmark = pytest.mark.ranks


def test_nodes_run_the_command_with_their_numbers(tmp_path):
    code = "import sys, os; print(*sys.argv[1:], os.environ['NODE']); sys.exit(int(sys.argv[1]) * 3)"
    command = [sys.executable, "-c", code, "{node}", "{nnodes}", "{endpoint}"]
    nodes = run_nodes(command, 2, timeout_s=TIMEOUT_S, log_dir=tmp_path, env={"NODE": "n{node}"})
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
    nodes = run_nodes([*command.split(), str(script)], 2, timeout_s=TIMEOUT_S)
    assert [n.returncode for n in nodes] == [0, 0], nodes[0].output
    assert time.monotonic() - started < TIMEOUT_S
    lines = sorted(line for n in nodes for line in n.output.splitlines() if line.startswith("node"))
    assert lines == ["node 0 sum 2", "node 1 sum 2"]
