"""Processes that join a process group by the four variables."""

import os
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
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def outcome(process: subprocess.Popen) -> tuple[int, str]:
    text, _ = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, text


def four(rank: int, port: int, world_size: int = 2, host: str = "127.0.0.1") -> dict:
    return {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": host, "MASTER_PORT": port}
