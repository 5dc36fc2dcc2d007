"""However run_ranks ends, no rank is left, and none aborts."""

import signal
import subprocess
import sys

import psutil
import pytest
import torch
import torch.distributed as dist

from ddp_lib import run_ranks
from tests.lab.ranks import TIMEOUT_S

pytestmark = pytest.mark.ranks


def leaves_a_ddp_model() -> float:
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    net = DistributedDataParallel(torch.nn.Linear(50, 50))
    for _ in range(3):
        net(torch.ones(4, 50)).sum().backward()
    return float(net.module.weight.grad.sum())


def test_a_ddp_model_left_in_the_function_does_not_abort_at_exit():
    for _ in range(12):
        run_ranks(leaves_a_ddp_model, 2, timeout_s=TIMEOUT_S)


PROGRAM = """
import faulthandler, os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has it ignored
faulthandler.dump_traceback_later(50)  # where it stands, if it does not end
from ddp_lib import run_ranks

def forever():
    import torch.distributed as dist
    dist.init_process_group("gloo")
    dist.barrier()
    print("ready", flush=True)
    time.sleep(600)

try:
    run_ranks(forever, 2, timeout_s=300)
except KeyboardInterrupt as error:
    print(error._render_traceback_())
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
    rest, _ = process.communicate(timeout=TIMEOUT_S)
    if how == signal.SIGINT:
        assert process.returncode == 130 and "interrupted, left: 0" in rest
        assert "['KeyboardInterrupt: the ranks have been ended']" in rest
    _, alive = psutil.wait_procs(family, timeout=TIMEOUT_S)
    assert alive == []
