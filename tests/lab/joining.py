"""Processes that join a process group by the four variables."""

import os
import re
import subprocess
import sys

JOIN = """
import sys
from ddp_lib import UserError, World
import torch
try:
    with World.join(join_timeout_s=float(sys.argv[1])) as world:
        print("sum", int(world.sum(torch.ones(1))), "of", world.world_size)
except UserError as error:
    print("refused:", error, file=sys.stderr)
    sys.exit(2)
"""

# torch loads a fifth faster without garbage collection.
QUICKLY = "import gc\ngc.disable()\nimport torch\ngc.enable()\n"
TIMEOUT_S = 60


def start(join_timeout_s: float = 30, code: str = JOIN, **variables) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MASTER_", "RANK", "WORLD_"))}
    env |= {k: str(v) for k, v in variables.items()}
    return subprocess.Popen(
        [sys.executable, "-c", QUICKLY + code, str(join_timeout_s)],
        env=env,
        text=True,
        stdin=subprocess.PIPE,  # closed by `outcome`
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


# Two ranks at each port, forked from a process that has imported all. They run `code` and end as a fresh
# process does; multiprocessing's forks end otherwise.
FORKS = """
import gc, os, sys
gc.disable()
import torch._dynamo, torch.nn.parallel, ddp_lib.distributed.world
gc.enable()
code, *ports = sys.argv[1:]
os.environ |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}
pids = []
for port in ports:
    os.environ["MASTER_PORT"] = port
    for rank in range(2):
        os.environ["RANK"] = str(rank)
        pids.append(os.fork())
        if not pids[-1]:
            break
    if not pids[-1]:
        break
    for pid in pids[-2:]:
        print("status", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
if not pids[-1]:
    exec(code)
"""


def fork_pairs(code: str, ports: list[int]) -> tuple[list[int], str]:
    """Runs `code` on two ranks at each port, one pair after another; all exit statuses, and the output."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MASTER_", "RANK", "WORLD_"))}
    done = subprocess.run(
        [sys.executable, "-c", FORKS, code, *map(str, ports)],
        **{"env": env, "text": True, "timeout": TIMEOUT_S},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
    )
    statuses = re.findall(r"^status (-?\d+)$", done.stdout, re.M)
    return [int(status) for status in statuses], done.stdout


def outcome(process: subprocess.Popen) -> tuple[int, str]:
    text, _ = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, text


def four(rank: int, port: int, world_size: int = 2, host: str = "127.0.0.1") -> dict:
    return {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": host, "MASTER_PORT": port}
