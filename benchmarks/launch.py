"""How long a cell waits for its ranks: run_ranks, and what a user would take instead.

python benchmarks/launch.py [--rounds 5] [--later 4]

A launch starts 2 ranks, which join a gloo group, all-reduce one number, and leave. A round: first
`python -c "import torch"`, what every rank of a freshly started job pays at least; then, for each way
of launching from a notebook, a fresh process that launches once and then again `--later` times; and
torchrun, which is a fresh process each time. Measuring in rounds spreads a busy moment of the machine
over all rows. Needs benchmarks/requirements.txt for accelerate; without it its rows are left out.
"""

import argparse
import importlib.util
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from report import save, table

LIMIT_S = 300
RANKS = 2


def all_reduce_once(*spawned: Any) -> float:
    """Runs on each rank; returns the number of ranks. spawned: rank and environment, from `spawn`."""
    import torch
    import torch.distributed as dist

    if spawned:
        rank, environment = spawned
        os.environ |= {**environment, "RANK": str(rank)}
    dist.init_process_group("gloo")
    x = torch.ones(1)
    dist.all_reduce(x)
    dist.destroy_process_group()
    assert x.item() == RANKS
    return x.item()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def by_run_ranks() -> Callable[[], object]:
    """In a fresh process, at once."""
    from ddp_lib import run_ranks

    return lambda: run_ranks(all_reduce_once, RANKS)


def by_run_ranks_later() -> Callable[[], object]:
    """As in a notebook whose reader has imported ddp_lib, which starts the fork server, and read on."""
    from multiprocessing import forkserver

    import psutil

    from ddp_lib.notebook import run_ranks as notebook

    notebook.start_server()
    server = psutil.Process(forkserver._forkserver._forkserver_pid)
    server.cpu_percent()
    while server.cpu_percent(1.0) > 5:
        pass  # it imports torch
    return lambda: notebook.run_ranks(all_reduce_once, RANKS)


def by_accelerate() -> Callable[[], object]:
    from accelerate import notebook_launcher

    return lambda: notebook_launcher(all_reduce_once, num_processes=RANKS, use_port=free_port())


def by_spawn() -> Callable[[], object]:
    from torch.multiprocessing import spawn

    def launch() -> None:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        spawn(all_reduce_once, ({**place, "WORLD_SIZE": str(RANKS)},), nprocs=RANKS)

    return launch


WAYS = {
    "`run_ranks`": by_run_ranks,
    "`run_ranks`, ddp_lib imported before": by_run_ranks_later,
    "accelerate's `notebook_launcher`": by_accelerate,
    "`torch.multiprocessing.spawn`": by_spawn,
}


def launches(way: str, count: int) -> list[float]:
    """Seconds of `count` launches, the first of them in a fresh process: this one."""
    launch = WAYS[way]()
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        launch()
        seconds.append(time.perf_counter() - began)
    return seconds


def process(*arguments: str) -> tuple[float, str]:
    """Seconds of a Python process, and what it printed last."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=LIMIT_S
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stderr}")
    return time.perf_counter() - began, (done.stdout.splitlines() or [""])[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--later", type=int, default=4, help="later launches in each round")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_rank:
        all_reduce_once()
        return
    if options.way:
        print(json.dumps(launches(options.way, 1 + options.later)))
        return

    ways = [
        way for way in WAYS if "accelerate" not in way or importlib.util.find_spec("accelerate")
    ]
    process("-c", "import torch")  # not counted: reads torch's files into the system's cache
    torch_name, torchrun = '`python -c "import torch"`', "torchrun, a process for each launch"
    runs: dict[str, list[float]] = {torch_name: [], torchrun: []}
    for _ in range(options.rounds):
        runs[torch_name].append(process("-c", "import torch")[0])
        for way in ways:
            later = ["--later", str(options.later)]
            seconds = json.loads(process(__file__, "--way", way, *later)[1])
            runs.setdefault(f"first {way}", []).append(seconds[0])
            runs.setdefault(f"later {way}", []).extend(seconds[1:])
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
        runs[torchrun].append(process(*command, __file__, "--as-rank")[0])

    medians = {name: statistics.median(seconds) for name, seconds in runs.items()}
    later, first = medians["later `run_ranks`"], medians[f"first {list(WAYS)[1]}"]
    main = (
        f"later launches take {later / medians[torch_name]:.3f} of the time of importing torch, the "
        f"first after ddp_lib was imported {first / medians[torch_name]:.3f}"
    )
    others = medians.get(f"later {list(WAYS)[2]}")
    if others:
        main += f"; later ones {later / others:.2f} of accelerate's"
    findings = [f"{main} (medians)."]
    result = save(
        "launch",
        "Starting ranks from a notebook",
        f"Seconds until {RANKS} ranks have joined a gloo group, all-reduced one number and left, "
        'beside `python -c "import torch"`. Each first launch is that of a fresh process, which has '
        "imported what it launches with.",
        [{"name": name, "unit": "s", "runs": seconds} for name, seconds in runs.items()],
        findings,
    )
    print(table(result["rows"]))
    print(*result["findings"], sep="\n")


if __name__ == "__main__":
    main()
