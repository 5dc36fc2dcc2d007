"""The log of many ranks and steps: reading it, watching it, plotting it.

python benchmarks/long_logs.py [--rounds 3] [--ranks 256] [--steps 100000] [--what read_run watch ...]

Writes the folder of such a run where temporary files go (TMPDIR), and removes it. Its logs are 16 files under
the names of all ranks, so that it needs little of the disk; they are read as often as there are ranks. Each
way is measured in a process of its own, from its start to its end, and to the first line that `watch` prints:
its memory is the proportional set size of the process and of those that it starts.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from select import select

import psutil
from report import save, table

DIFFERENT = 16
LOOK_S = 0.1  # between two looks at memory and CPU time
WAYS = {
    "read_run": "from ddp_lib.run_dir.log import read_run; print(len(read_run({folder!r})))",
    "read_events": "from ddp_lib.run_dir.log import read_events; print(len(read_events({folder!r})))",
    "watch": "from ddp_lib.report.watch import watch; watch({folder!r}, wait_s=1e9)",
    "plot": "from ddp_lib.report.plots import plot_run; print(plot_run({folder!r}))",
}


def make_run(folder: Path, ranks: int, steps: int) -> int:
    """Writes the logs; returns their bytes in all."""
    total = 0
    for rank in range(ranks):
        path = folder / f"rank{rank}.jsonl"
        if rank >= DIFFERENT:
            os.link(folder / f"rank{rank % DIFFERENT}.jsonl", path)
        else:
            path.write_text("".join(lines(rank, ranks, steps)))
        total += path.stat().st_size
    return total


def lines(rank: int, ranks: int, steps: int) -> list[str]:
    """What RunLog writes, with as many digits."""
    chance, now = random.Random(rank), time.time() - steps * 0.05
    start = {"event": "start", "start": 0, "step": 0, "world_size": ranks, "host": "here", "time": now}
    made = [json.dumps(start)]
    for step in range(steps):
        data_s, compute_s = chance.expovariate(1000), chance.gauss(0.04, 0.004)
        now += data_s + compute_s
        numbers = {"epoch": step // 1000, "step": step, "samples": 64, "loss": 2.3 * chance.random()}
        numbers |= {"lr": 0.1 * (1 - step / steps), "data_s": data_s, "compute_s": compute_s}
        made.append(json.dumps({**numbers, "step_s": data_s + compute_s, "time": now}))
        if step % 1000 == 999:
            end = {"event": "epoch", "epoch": step // 1000, "step": step + 1, "test_accuracy": step / steps}
            made.append(json.dumps({**end, "time": now}))
    return [line + "\n" for line in made]


def run(code: str, first_line: bool) -> tuple[float, float, float]:
    """Seconds, seconds of CPU time, and most bytes of memory of a Python process and those that it starts."""
    began, most = time.perf_counter(), 0.0
    cpu_s: dict[int, float] = {}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while not select([process.stdout], [], [], LOOK_S)[0]:  # it prints when it is done
            memory = 0.0
            for part in [(own := psutil.Process(process.pid)), *own.children(recursive=True)]:
                with suppress(psutil.Error):
                    memory += part.memory_full_info().pss
                    times = part.cpu_times()
                    cpu_s[part.pid] = times.user + times.system
            most = max(most, memory)
        seconds = time.perf_counter() - began
        line = process.stdout.readline()
        if first_line:
            process.kill()
        if not line or (process.wait() and not first_line):
            raise SystemExit(f"failed: {code}")
    return seconds, sum(cpu_s.values()), most


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=256)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--what", nargs="*", default=[*WAYS], choices=[*WAYS])
    options = parser.parse_args()
    rows, findings = [], []
    with tempfile.TemporaryDirectory(prefix="long_logs") as folder:
        total = make_run(Path(folder), options.ranks, options.steps)
        runs = {what: [] for what in options.what}
        for _ in range(options.rounds):
            for what in options.what:
                runs[what].append(run(WAYS[what].format(folder=folder), what == "watch"))
                print(what, runs[what][-1], flush=True)
    size = f"{options.ranks} ranks x {options.steps:,} steps"
    for what, measured in runs.items():
        seconds, cpu_s, memory = (list(column) for column in zip(*measured, strict=True))
        until = ", to its first line" if what == "watch" else ""
        rows += [
            {"name": f"{what}{until}", "unit": "s", "runs": [round(run, 2) for run in seconds]},
            {"name": f"{what}{until}, CPU time", "unit": "s", "runs": [round(run, 2) for run in cpu_s]},
            {"name": f"{what}{until}, memory", "unit": "GB", "runs": [round(run / 1e9, 3) for run in memory]},
        ]
        findings.append(
            f"{what}{until}, of {size}: {statistics.median(seconds):.1f} s, with "
            f"{statistics.median(cpu_s):.1f} s of CPU time, {statistics.median(memory) / 1e9:.2f} GB."
        )
    what = (
        f"{size} ({total / 1e9:.1f} GB of logs, {DIFFERENT} different ones, in the page cache), each way in "
        f"a process of its own. The computer's load average was {os.getloadavg()[0]:.0f}."
    )
    print(table(save("long_logs", "Long logs", what, rows, findings)["rows"]))


if __name__ == "__main__":
    main()
