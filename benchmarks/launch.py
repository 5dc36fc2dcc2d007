"""How long a cell waits for its ranks: run_ranks against starting Python and importing torch.

python benchmarks/launch.py [--rounds 5] [--later 4]

A round: `python -c "import torch"`, what every rank of a freshly started job pays at least; then a
fresh process that imports ddp_lib and calls run_ranks once, and then again `--later` times. Each
call starts 2 ranks, which join a gloo group, all-reduce one number, and leave. Measuring in rounds
spreads a busy moment of the machine over all three rows.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

from report import save, table

LIMIT_S = 300


def all_reduce_once() -> float:
    """Runs on each rank; returns the number of ranks."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    x = torch.ones(1)
    dist.all_reduce(x)
    dist.destroy_process_group()
    return x.item()


def launches(count: int) -> list[float]:
    """Seconds of `count` calls of run_ranks, the first of them in a fresh process: this one."""
    from ddp_lib import run_ranks

    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        answers = run_ranks(all_reduce_once, 2)
        seconds.append(time.perf_counter() - began)
        if answers != [2.0, 2.0]:
            raise SystemExit(f"2 ranks should each find 2.0, but found {answers}")
    return seconds


def process(*arguments: str) -> tuple[float, str]:
    """Seconds of a Python process, and what it printed last."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], stdout=subprocess.PIPE, text=True, timeout=LIMIT_S, check=True
    )
    return time.perf_counter() - began, (done.stdout.splitlines() or [""])[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--later", type=int, default=4, help="later launches in each round")
    parser.add_argument("--one-process", type=int, metavar="N", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_process:
        print(json.dumps(launches(options.one_process)))
        return

    process("-c", "import torch")  # not counted: reads torch's files into the system's cache
    imports, first, later = [], [], []
    for _ in range(options.rounds):
        imports.append(process("-c", "import torch")[0])
        seconds = json.loads(process(__file__, "--one-process", str(1 + options.later))[1])
        first.append(seconds[0])
        later += seconds[1:]
    ratio = statistics.median(later) / statistics.median(imports)
    result = save(
        "launch",
        "Starting ranks from a notebook",
        "Seconds until 2 ranks have joined a gloo group, all-reduced one number and left, "
        'beside `python -c "import torch"`. Each first launch is that of a fresh process.',
        [
            {"name": '`python -c "import torch"`', "unit": "s", "runs": imports},
            {"name": "first `run_ranks`", "unit": "s", "runs": first},
            {"name": "later `run_ranks`", "unit": "s", "runs": later},
        ],
        [f"A later launch takes {ratio:.3f} of the time of importing torch (medians)."],
    )
    print(table(result["rows"]))
    print(*result["findings"], sep="\n")


if __name__ == "__main__":
    main()
