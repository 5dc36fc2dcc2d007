"""%ranks and %%ranks in a real kernel: ranks that stay, whatever a cell does to them."""

import os
import signal

import pytest

from tests.lab.kernel import Kernel, kernel
from tests.lab.processes import all_gone

pytestmark = pytest.mark.ranks

NEW = "ranks 0-1: new; names that are gone: "
BARRIER = """
%%ranks
import torch.distributed as dist
print("waiting", flush=True)
if rank == 0:
    dist.barrier()
else:
    while True: pass
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One kernel, since its start takes longer than a test; new ranks take 0.2 s."""
    with kernel(tmp_path_factory.mktemp("kernel")) as started:
        started.run("%load_ext ddp_lib")
        yield started


@pytest.fixture
def notebook(shared):
    assert shared.run("%ranks 2").text == "ranks 0-1: ready\n"
    return shared


@pytest.fixture(autouse=True)
def nothing_left():
    """The kernel stays until the last test, which looks for what is left."""


def usable(notebook: Kernel) -> bool:
    """Whether the ranks reach each other, in one group."""
    cell = "import torch, torch.distributed as dist\nx = torch.ones(1)\ndist.all_reduce(x)\nint(x)"
    return notebook.run(f"%%ranks\n{cell}").result == "[2, 2]"


def test_names_stay_and_values_text_and_pictures_come_back(notebook):
    assert usable(notebook)
    assert notebook.run("%%ranks\nmine = [rank]").result == ""
    for _ in range(30):  # many cells in a row
        notebook.run("%%ranks\nmine.append(mine[-1] + 1)")
    assert notebook.run("%%ranks\nmine[-1]").result == "[30, 31]"
    assert notebook.run("_[1] + 1").result == "32"
    assert notebook.run("%%ranks 1\nlen(mine), rank, world_size").result == "[(31, 1, 2)]"
    shown = notebook.run('%%ranks\nprint("all")\nprint("own", rank)\nprint("end")\nrank;  # quiet')
    assert (shown.text, shown.result) == (
        "[ranks 0-1] all\n[rank 0] own 0\n[rank 1] own 1\n[ranks 0-1] end\n",
        "",
    )
    assert "[Linear" in notebook.run("%%ranks\nimport torch\nlambda: 0\ntorch.nn.Linear(1, 1)").result
    shown = notebook.run(
        """
        %%ranks 1
        import matplotlib.pyplot as plt
        plt.plot([1, 2])
        plt.show()
        print("below")
        """
    )
    figure = "[rank 1] <Figure size 640x480 with 1 Axes>"
    assert shown.text.splitlines()[-2:] == [figure, "[rank 1] below"]
    assert [sorted(data) for data in shown.displays] == [["image/png", "text/plain"]]
    shown = notebook.run('%%ranks\nprint("\\n".join(map(str, range(1_000_000))))')
    lines = shown.text.splitlines()
    assert len(lines) == 1001 and lines[0] == "[ranks 0-1] 0" and lines[-1] == "[ranks 0-1] 999999"
    assert lines[500] == "[ranks 0-1] ... 999,000 lines left out ..."
    for magic, says in [
        ("%%ranks 7\n1", "UsageError: %%ranks 7: give ranks from 0 to 1, such as 0 or 0,1"),
        ("%%ranks --timeout-s 0\n1", "UsageError: --timeout-s is 0.0: give a number of seconds"),
        ("%ranks 0", "UsageError: %ranks 0: give a number of ranks, 1 or more, or stop"),
        ("%ranks 2 --nnodes 2", "UsageError: --rdzv-endpoint '': write HOST:PORT"),
        ("%ranks", "ranks 0-1: ready"),
        ("%ranks stop", ""),
        ("%%ranks\n1", "UsageError: there are no ranks: start two with %ranks 2"),
    ]:
        assert notebook.run(magic).text.startswith(says)


def test_a_cell_that_goes_wrong_says_where_and_what_is_lost(notebook):
    notebook.run("%%ranks\nkept = 5")
    shown = notebook.run('%%ranks\ndef f():\n    if rank == 1:\n        raise ValueError("on purpose")\nf()')
    assert shown.error == (
        "RankError: rank 1: ValueError: on purpose\n  line 5 in <module>: f()\n"
        '  line 4 in f: raise ValueError("on purpose")'
    )
    assert notebook.run("%%ranks\n1 +").error.startswith(
        "RankError: rank 0: SyntaxError: invalid syntax\n  line 2"
    )
    assert usable(notebook) and notebook.run("%%ranks\nkept").result == "[5, 5]"

    shown = notebook.run(BARRIER.replace("%%ranks", "%%ranks --timeout-s 2"))
    assert shown.text == "[ranks 0-1] waiting\n"
    assert shown.error.startswith("RankError: still running after 2 s\nrank 0 is in barrier\n  line 5")
    assert "rank 1 runs its own code\n  line 7 in <module>: while True: pass" in shown.error
    assert shown.error.endswith(NEW + "dist, f, kept, torch, x")
    assert usable(notebook)

    shown = notebook.run("%%ranks\nif rank == 1: raise KeyError(1)\ndist.barrier()")
    assert shown.error.startswith("RankError: rank 1: KeyError: 1") and "rank 0 is in barrier" in shown.error
    assert usable(notebook)

    shown = notebook.run("%%ranks\nimport os\nif rank == 0: os.kill(os.getpid(), 9)\ndist.barrier()")
    assert shown.error == f"RankError: rank 0: died of SIGKILL\n{NEW}dist, torch, x"
    assert usable(notebook)

    pid = int(notebook.run("%%ranks 1\nimport os\nos.getpid()").result.strip("[]"))
    os.kill(pid, signal.SIGKILL)
    assert all_gone([p for p in notebook.family() if p.pid == pid])
    assert "rank 1: died of SIGKILL\nranks 0-1: new" in notebook.run("%%ranks\nx").error
    assert usable(notebook)


def test_the_interrupt_comes_back_and_input_is_served_or_refused(notebook):
    def interrupt(text: str) -> None:
        if "waiting" in text:
            notebook.manager.interrupt_kernel()

    notebook.run("%%ranks\nkept = 5")
    shown = notebook.run('%%ranks\nimport time\nprint("waiting")\ntime.sleep(600)', on_text=interrupt)
    assert shown.error == "Interrupted: the ranks have been interrupted and keep their names"
    assert notebook.run("%%ranks\nkept").result == "[5, 5]"
    shown = notebook.run(BARRIER, on_text=interrupt)
    assert "rank 0 is in barrier" in shown.error and shown.error.endswith(NEW + "kept, time")
    assert usable(notebook)

    ask = 'name = input("name? ")\nname + str(rank)'
    shown = notebook.run(f"%%ranks\n{ask}", answers=["a", "a"])
    assert (shown.text, shown.result) == ("[ranks 0-1] name? a\n", "['a0', 'a1']")
    shown = notebook.run("%%ranks 1\nn = 7\nbreakpoint()\nm = n", answers=["p n * 6", "c"])
    assert "[rank 1] 42\n" in shown.text and shown.error == ""
    for cell in (ask, "breakpoint()\nm = 1"):
        assert (
            "RuntimeError: input() and breakpoint() find nobody to ask"
            in notebook.run(f"%%ranks\n{cell}").error
        )
    assert usable(notebook)
    code = 'from ddp_lib import run_ranks\nrun_ranks(lambda: input("name? "), 1)'
    assert notebook.run(code, answers=["b"]).result == "['b']"
    assert "find nobody to ask here: run the cell in JupyterLab" in notebook.run(code).error


def test_a_restart_and_the_kernels_death_leave_no_process(notebook):
    def family():
        notebook.run('%%ranks\nimport subprocess\nchild = subprocess.Popen(["sleep", "600"])')
        processes = notebook.family()
        assert len(processes) >= 7  # the fork server, the store's host, two ranks with a child each
        return processes

    before = family()
    notebook.manager.restart_kernel()  # asks, waits for some seconds, and kills
    assert all_gone(before)
    notebook.connect()
    assert notebook.run("%load_ext ddp_lib\n%ranks 2").text == "ranks 0-1: ready\n"
    before = family()
    os.kill(before[0].pid, signal.SIGKILL)
    assert all_gone(before)
