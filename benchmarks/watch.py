"""What it costs to watch a run.

python benchmarks/watch.py [reading | sync] [--rounds 9]     sync as root, on Linux

Reading: a folder of 8 ranks with 10,000 steps gets new lines; this measures the CPU time of a look at them,
with its warnings and the table, twice a second. Drawing: the CPU time of the picture and its share of a core
in a notebook's cell. Sync: two machines, which are network namespaces of this computer, share no disk and
train; in some epochs a thread sends the log lines every second, in as many it sleeps, in an order by chance.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

from report import RESULTS, ROOT, save, table

sys.path.insert(0, str(ROOT))

RANKS, STEPS, LOOKS = 8, 10_000, 20
SYNC_S = 1.0  # five times as often as by default
PAIRS = 10  # of epochs, each about a second long, in a round
TIMEOUT_S = 300
UNITS = {
    "reading 8 ranks, two looks a second, part of a core": "%",
    "the first look at 10,000 steps of 8 ranks": "s",
    "drawing a picture": "s",
    "watching in a cell, drawing included, part of a core": "%",
    "the latest line of the other machine in an epoch comes after": "s",
    "sending and taking log lines, part of the ranks' CPU time": "%",
    "images/s with it, median step of an epoch": "images/s",
    "images/s without": "images/s",
    "with it / without, median of ten pairs of epochs": "",
}


def write_lines(logs: list[Any], begin: int, steps: int) -> None:
    noise = random.Random(begin)
    for step in range(begin, begin + steps):
        for log in logs:
            times = {"data_s": 0.001, "compute_s": 0.03, "step_s": 0.031, "time": time.time()}
            log.write(epoch=0, step=step, samples=16, loss=1 + noise.random(), lr=0.1, **times)


def watch_one_process() -> dict[str, float]:
    from ddp_lib.report.live_run import LiveRun
    from ddp_lib.report.watch import LOOK_S, Cell, table
    from ddp_lib.run_dir.log import RunLog

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        logs = [stack.enter_context(RunLog(folder, rank)) for rank in range(RANKS)]
        for log in logs:
            log.start(step=0, world_size=RANKS)
        write_lines(logs, 0, STEPS)
        run, began_s = LiveRun(folder), time.process_time()
        run.look()
        first_s = time.process_time() - began_s
        look_s = []
        for look in range(LOOKS):
            write_lines(logs, STEPS + 16 * look, 16)  # 32 steps a second
            began_s = time.process_time()
            run.look()
            table(run, 24)
            look_s.append(time.process_time() - began_s)
        with patch("IPython.display.display", MagicMock()):
            cell = Cell(run)
            cell.show(True)  # imports what draws
            began_s = time.process_time()
            cell._draw()
            draw_s = time.process_time() - began_s
            wrote_s, began_s, wall_s = 0.0, time.process_time(), time.perf_counter()
            for look in range(LOOKS):
                before_s = time.process_time()
                write_lines(logs, STEPS + 16 * (LOOKS + look), 16)
                wrote_s += time.process_time() - before_s
                cell.show(run.look())
                time.sleep(LOOK_S)
            used_s, wall_s = time.process_time() - began_s - wrote_s, time.perf_counter() - wall_s
        values = [100 * statistics.median(look_s) / LOOK_S, first_s, draw_s, 100 * used_s / wall_s]
    return dict(zip([*UNITS][:4], values, strict=True))


def plan(pairs: int) -> list[bool]:
    """Whether log lines are sent within each epoch: of each pair of epochs one, in an order by chance."""
    pairs_on = [
        (True, False) if random.Random(pair).random() < 0.5 else (False, True) for pair in range(pairs)
    ]
    return [is_on for pair in pairs_on for is_on in pair]


def rank(pairs: int, flags: list[str]) -> int:
    """A rank whose thread for the log lines sleeps in some epochs; at its end it says its CPU time in the
    others, and that of the thread."""
    from ddp_lib import train
    from ddp_lib.data.sampler import TrainSampler
    from ddp_lib.run_dir.log_sync import LogSync

    on, cpu_s, began_s = threading.Event(), [0.0, 0.0], [0.0]
    set_epoch, sync, close = TrainSampler.set_epoch, LogSync._sync, LogSync.close

    class WhileOn(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            super().wait(timeout)
            on.wait()
            return self.is_set()

    def timed_epoch(self: TrainSampler, epoch: int, start_step: int = 0) -> None:
        now = time.process_time()
        cpu_s[on.is_set()] += now - began_s[0]
        began_s[0] = now
        (on.set if plan(pairs)[epoch] else on.clear)()
        set_epoch(self, epoch, start_step)

    def timed_sync(self: LogSync) -> None:
        self._closed = WhileOn()
        sync(self)
        print(f"sync_s={time.thread_time()}", flush=True)

    def close_now(self: LogSync) -> None:
        on.set()
        close(self)

    patches = patch.object(LogSync, "_sync", timed_sync), patch.object(LogSync, "close", close_now)
    with patches[0], patches[1], patch.object(TrainSampler, "set_epoch", timed_epoch):
        status = train.main(flags)
    print(f"cpu_s={cpu_s[True]}", flush=True)
    return status


def train_on_two(rounds: int, folder: Path) -> dict[str, list[float]]:
    """Two machines train; the values of the last five units, one per round."""
    from ddp_lib import read_run
    from tests.lab.images import write_images
    from tests.lab.machines import Lab

    pairs = PAIRS * rounds
    images = write_images(folder / "images", train=640, test=30)
    flags = f"--data {images} --data-dir {folder} --global-batch-size 64 --epochs {2 * pairs}"
    flags += f" --log-sync-s {SYNC_S}"
    copy, late_s, seen = folder / "0" / "rank1.jsonl", [0.0] * 2 * pairs, 0
    with Lab(2, folder) as lab:
        for number, machine in enumerate(lab.machines):
            world = {"RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": lab.machines[0].address}
            run_dir = ["--run-dir", str(folder / str(number))]
            command = ["python", __file__, "--rank", str(pairs), *flags.split(), *run_dir]
            machine.start(command, ROOT, **world, MASTER_PORT="29500")
        programs = [machine.programs[0] for machine in lab.machines]
        while not all(program.ended for program in programs):
            lines = copy.read_bytes().rpartition(b"\n")[0].splitlines()[seen:] if copy.exists() else []
            now = time.time()
            for line in map(json.loads, lines):
                if "loss" in line:
                    late_s[line["epoch"]] = max(late_s[line["epoch"]], now - line["time"])
            seen += len(lines)
            time.sleep(0.05)
        output = "\n".join(program.output for program in programs)
        if any(program.wait(TIMEOUT_S) for program in programs):
            raise SystemExit(output)
    words = [word.split("=") for word in output.split() if word.startswith(("cpu_s=", "sync_s="))]
    cpu_s, sync_s = (sum(float(s) for other, s in words if other == name) for name in ("cpu_s", "sync_s"))
    steps = read_run(folder / "0")
    speed = 64 / steps[steps["rank"] == 0].groupby("epoch")["step_s"].median()
    is_on = plan(pairs)
    on, off = (
        [float(speed[epoch]) for epoch, is_it in enumerate(is_on) if is_it == which]
        for which in (True, False)
    )
    late_s = [seconds for seconds, is_it in zip(late_s, is_on, strict=True) if is_it]
    ratios = [a / b for a, b in zip(on, off, strict=True)]

    def by_round(values: list[float], conclude: Any = statistics.median) -> list[float]:
        return [conclude(values[n : n + PAIRS]) for n in range(0, pairs, PAIRS)]

    lists = [by_round(late_s, max), [100 * sync_s / cpu_s], *map(by_round, (on, off, ratios))]
    return dict(zip([*UNITS][4:], lists, strict=True))


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        sys.exit(rank(int(sys.argv[2]), sys.argv[3:]))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("part", nargs="?", choices=("reading", "sync"), help="default: both")
    parser.add_argument("--rounds", type=int, default=9, help="of ten pairs of epochs, on two machines")
    options = parser.parse_args()
    from tests.lab.namespaces import missing

    saved = RESULTS / "watch.json"
    rows = json.loads(saved.read_text())["rows"] if saved.exists() else []
    runs: dict[str, list[float]] = {name: [] for name in UNITS} | {
        row["name"]: row["runs"] for row in rows if row["name"] in UNITS
    }
    if options.part != "sync":
        rounds = [watch_one_process() for _ in range(3)]
        save_runs(runs := runs | {name: [values[name] for values in rounds] for name in rounds[0]})
    if options.part == "reading":
        return
    if reason := missing():
        raise SystemExit(f"not on two machines: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        save_runs(runs | train_on_two(options.rounds, Path(folder)))


def save_runs(runs: dict[str, list[float]]) -> None:
    rows = [{"name": n, "unit": UNITS[n], "runs": values} for n, values in runs.items() if values]
    median = {name: statistics.median(values) for name, values in runs.items() if values}
    names = [*UNITS]
    findings = [
        f"Watching 8 ranks of 10,000 steps takes {median[names[0]]:.1f} % of a core to read, and with the "
        f"pictures {median[names[3]]:.0f} %."
    ]
    if names[-1] in median:
        ratios = runs[names[-1]]
        findings.append(
            f"Sending the log lines to the master every {SYNC_S:g} s takes {median[names[5]]:.2f} % of the "
            f"ranks' CPU time; no line was later than {max(runs[names[4]]):.1f} s. Images/s with it are "
            f"{median[names[-1]]:.2f} of those without, in the median of {len(ratios)} rounds of {PAIRS} "
            f"pairs of epochs, from {min(ratios):.2f} to {max(ratios):.2f}."
        )
    what = (
        "8 ranks that write 32 steps a second each; two looks a second. And two machines with a rank each, "
        f"which share no disk and train; in half of the epochs log lines are sent every {SYNC_S:g} s, in the "
        f"others only at the end. The computer's load average was {os.getloadavg()[0]:.0f}; a load above the "
        "number of its cores makes images/s vary."
    )
    result = save("watch", "Watching a run", what, rows, findings)
    print(table(result["rows"]), *findings, sep="\n", flush=True)


if __name__ == "__main__":
    main()
