"""How long a cell waits for ranks that are there already: `%%ranks`, beside `run_ranks` and ipyparallel.

python benchmarks/cells.py [--rounds 20]

All cells run in one Jupyter kernel; each all-reduces one number over 2 ranks. Seconds are counted from the
request to execute the cell until the kernel is idle again. A round runs each way's cell once, so that a
moment in which the machine is busy affects all alike. ipyparallel is measured if it is installed, as by
`make bench`.
"""

import argparse
import importlib.util
import os
import statistics
import time
from typing import Any

from jupyter_client.manager import start_new_kernel
from report import save, table

TIMEOUT_S = 300
REDUCE = """
x = torch.ones(1)
dist.all_reduce(x)
int(x)
"""
IMPORTS = "import torch, torch.distributed as dist\n"
START_PX = """
import ipyparallel, tempfile
cluster = ipyparallel.Cluster(n=2)
clients = cluster.start_and_connect_sync()
clients[:].activate()
clients[:].scatter("rank", range(2), flatten=True)
clients[:]["path"] = tempfile.mktemp()
"""
STOP_PX = "cluster.stop_cluster_sync()"  # else its processes outlive the kernel
JOIN_PX = """%%px
import torch, torch.distributed as dist
dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
"""

# For each way: the cells that prepare it, and the cell that is measured.
WAYS: dict[str, tuple[list[str], str]] = {
    "`%%ranks`, ranks that are there": (
        ["%load_ext ddp_lib\n%ranks 2", f"%%ranks\n{IMPORTS}"],
        f"%%ranks\n{REDUCE}",
    ),
    "`run_ranks`, new ranks": (
        [
            f"""
from ddp_lib import run_ranks
def all_reduce_once():
    {IMPORTS.strip()}
    dist.init_process_group("gloo")
    x = torch.ones(1)
    dist.all_reduce(x)
    return int(x)
"""
        ],
        "run_ranks(all_reduce_once, 2)",
    ),
}
if importlib.util.find_spec("ipyparallel"):
    WAYS["ipyparallel's `%%px`"] = ([START_PX, JOIN_PX], f"%%px\n{REDUCE}")


def execute(client: Any, cell: str) -> float:
    """Seconds until the kernel has executed the cell."""
    began = time.perf_counter()
    reply = client.execute_interactive(cell, timeout=TIMEOUT_S, output_hook=lambda message: None)
    if reply["content"]["status"] != "ok":
        raise SystemExit(f"this cell failed ({reply['content'].get('evalue')}):\n{cell}")
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    manager, client = start_new_kernel()
    try:
        for cells, measured in WAYS.values():
            for cell in [*cells, measured, measured]:  # what is measured, not yet counted: warm caches
                execute(client, cell)
        runs: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(options.rounds):
            for way, (_, measured) in WAYS.items():
                runs[way].append(execute(client, measured))
        if len(WAYS) > 2:
            execute(client, STOP_PX)
    finally:
        client.stop_channels()
        manager.shutdown_kernel()

    medians = [statistics.median(seconds) for seconds in runs.values()]
    finding = (
        f"a cell of `%%ranks` takes {medians[0] / medians[1]:.2f} of the time of a launch by `run_ranks`"
    )
    finding += f", {medians[0] / medians[2]:.2f} of `%%px`'s" if medians[2:] else ""
    result = save(
        "cells",
        "Cells on ranks that stay",
        "Seconds from a cell's request until the kernel is idle again; the cell all-reduces one number over "
        "2 ranks. One kernel, the ways by turns."
        + ("" if medians[2:] else " ipyparallel was not installed, so its `%%px` is missing.")
        + f" The computer's load average was {os.getloadavg()[0]:.0f}.",
        [{"name": name, "unit": "s", "runs": seconds} for name, seconds in runs.items()],
        [f"{finding} (medians)."],
    )
    print(table(result["rows"]))
    print(*result["findings"], sep="\n")


if __name__ == "__main__":
    main()
