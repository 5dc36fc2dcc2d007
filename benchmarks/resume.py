"""What a killed worker, a checkpoint and the run log cost.

python benchmarks/resume.py [--rounds 3]

A worker of two is killed (SIGKILL) in the second epoch; the agent starts both again, and they go on
from the last checkpoint. Counted: seconds from the kill until a step has ended that had not been
done before, and of them those spent on doing steps again. From the same runs' logs: a checkpoint's
share of an epoch. Beside it, timed alone: one line of the run log, against the median step.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from report import save, table
from throughput import ENVIRONMENT

LIMIT_S = 900


def kill_one_rank(folder: Path) -> dict[str, float]:
    from ddp_lib import read_run
    from ddp_lib.run_dir.log import read_events

    command = [sys.executable, "-m", "ddp_lib.launch", "train", "--data", "shapes", "--epochs", "2"]
    command += ["--nproc-per-node", "2", "--max-restarts", "1", "--run-dir", str(folder / "run")]
    command += ["--data-dir", str(folder)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    log = folder / "run" / "rank1.jsonl"
    deadline = time.monotonic() + LIMIT_S
    while not (log.exists() and log.read_text().count('"epoch": 1,') > 20):
        if process.poll() is not None or time.monotonic() > deadline:
            process.terminate()
            raise SystemExit("the run ended before a rank could be killed")
        time.sleep(0.05)
    ranks = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.name().startswith("ddp-rank")
    ]
    killed = time.time()
    os.kill(ranks[-1].pid, signal.SIGKILL)
    if process.wait(LIMIT_S):
        raise SystemExit(f"the resumed run ended with status {process.returncode}")
    steps = read_run(folder / "run", superseded=True)
    steps = steps[steps["rank"] == 0]
    first, second = steps[steps["start"] == 0], steps[steps["start"] == 1]
    new = second[second["step"] > first["step"].max()].iloc[0]
    again = second[second["step"] <= first["step"].max()]["step_s"].sum()
    events = read_events(folder / "run")
    written = events[(events["event"] == "checkpoint") & (events["start"] == 0)]["seconds"]
    epoch_s = first[first["epoch"] == 0]["step_s"].sum()
    return {
        "until a new step": float(new["time"] - killed),
        "again": float(again),
        "checkpoint": float(written.iloc[0]),
        "epoch": float(epoch_s),
        "step": float(first["step_s"].median()),
    }


def log_line_s(lines: int = 2000) -> float:
    """Median seconds of writing one line."""
    from ddp_lib.run_dir.log import RunLog

    seconds = []
    with tempfile.TemporaryDirectory() as folder, RunLog(Path(folder), 0) as log:
        for step in range(lines):
            began = time.perf_counter()
            log.write(epoch=0, step=step, samples=64, loss=1.23456789, lr=0.1, data_s=0.0123,
                      compute_s=0.0456, step_s=0.0579, time=time.time())  # fmt: skip
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rounds = []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            rounds.append(kill_one_rank(Path(folder)))
    line_s = log_line_s()
    waited = [one["until a new step"] - one["again"] for one in rounds]
    share = [100 * one["checkpoint"] / one["epoch"] for one in rounds]
    log_share = 100 * line_s / statistics.median(one["step"] for one in rounds)
    rows = [
        {
            "name": "kill to a new step",
            "unit": "s",
            "runs": [r["until a new step"] for r in rounds],
        },
        {"name": "of it, steps done again", "unit": "s", "runs": [r["again"] for r in rounds]},
        {"name": "of it, all else", "unit": "s", "runs": waited},
        {"name": "a checkpoint, of an epoch", "unit": "%", "runs": share},
        {"name": "a line of the log, of a step", "unit": "%", "runs": [log_share]},
    ]
    findings = [
        f"A killed worker costs {statistics.median(waited):.1f} s and the steps after the last "
        f"checkpoint; the run log costs {log_share:.3f} % of a step, a checkpoint "
        f"{statistics.median(share):.2f} % of an epoch of 10,000 images."
    ]
    what = "Two ranks on the built-in images; one of them is killed in the second epoch."
    result = save("resume", "A killed worker, checkpoints, the log", what, rows, findings)
    print(table(result["rows"]))
    print(*findings, sep="\n")


if __name__ == "__main__":
    main()
