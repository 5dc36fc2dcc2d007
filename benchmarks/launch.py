"""How long a notebook's cell waits for its ranks: run_ranks and its alternatives.

python benchmarks/launch.py [--rounds 5] [--later 4]

A launch starts 2 ranks, which join a gloo group, all-reduce one number, and leave. A round measures:

- `python -c "import torch"`, the least that every rank of a newly started job has to do;
- for each way of launching from a notebook, a new process that launches once, and then `--later` times;
- torchrun, which is a new process each time.

Because of the rounds, a moment in which the machine is busy affects all rows alike. accelerate needs
benchmarks/requirements.txt; if it is not installed, its rows are left out.
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

TIMEOUT_S = 300
RANKS = 2


def all_reduce_once(*spawned: Any) -> float:
    """Runs on each rank; returns the number of ranks. `spawn` passes the rank and the environment."""
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
    """Launches immediately in a new process."""
    from ddp_lib import run_ranks

    return lambda: run_ranks(all_reduce_once, RANKS)


def by_run_ranks_later() -> Callable[[], object]:
    """Launches some time after the import of ddp_lib, which starts the fork server, as readers do."""
    from multiprocessing import forkserver

    import psutil

    from ddp_lib.notebook import run_ranks as notebook

    notebook.start_server(notebook.PRELOAD)
    server = psutil.Process(forkserver._forkserver._forkserver_pid)
    server.cpu_percent()
    while server.cpu_percent(1.0) > 5:
        pass  # the fork server is still importing torch
    return lambda: notebook.run_ranks(all_reduce_once, RANKS)


def by_accelerate() -> Callable[[], object]:
    from accelerate import notebook_launcher

    return lambda: notebook_launcher(all_reduce_once, num_processes=RANKS, use_port=free_port())


def by_spawn() -> Callable[[], object]:
    from torch.multiprocessing import spawn

    def launch() -> None:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        spawn(all_reduce_once, ({**address, "WORLD_SIZE": str(RANKS)},), nprocs=RANKS)

    return launch


WAYS = {
    "`run_ranks`": by_run_ranks,
    "`run_ranks`, ddp_lib imported before": by_run_ranks_later,
    "accelerate's `notebook_launcher`": by_accelerate,
    "`torch.multiprocessing.spawn`": by_spawn,
}


def launches(way: str, count: int) -> list[float]:
    """Seconds of each of `count` launches from this process, which is new."""
    launch = WAYS[way]()
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        launch()
        seconds.append(time.perf_counter() - began)
    return seconds


def process(*arguments: str) -> tuple[float, str]:
    """Seconds that a Python process took, and the last line that it printed."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S)
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

    ways = [way for way in WAYS if "accelerate" not in way or importlib.util.find_spec("accelerate")]
    process("-c", "import torch")  # not counted: brings torch's files into the system's cache
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
    main_finding = (
        f"a later launch takes {later / medians[torch_name]:.3f} of the time of importing torch, the "
        f"first launch after ddp_lib was imported {first / medians[torch_name]:.3f}"
    )
    accelerate_s = medians.get(f"later {list(WAYS)[2]}")
    if accelerate_s:
        main_finding += f"; a later launch takes {later / accelerate_s:.2f} of accelerate's time"
    findings = [f"{main_finding} (medians)."]
    result = save(
        "launch",
        "Starting ranks from a notebook",
        f"Seconds until {RANKS} ranks have joined a gloo group, all-reduced one number and left; for "
        'comparison, `python -c "import torch"`. Each first launch is in a new process, which has '
        "already imported the library that it launches with.",
        [{"name": name, "unit": "s", "runs": seconds} for name, seconds in runs.items()],
        findings,
    )
    print(table(result["rows"]))
    print(*result["findings"], sep="\n")


if __name__ == "__main__":
    main()
