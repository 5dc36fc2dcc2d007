"""What a killed worker, a checkpoint and the run log cost.

python benchmarks/resume.py [--rounds 3]

One of two workers is killed (SIGKILL) in the second epoch. The agent starts both again, and they resume
from the last checkpoint. This measures the seconds from the kill until a step has ended that had not been
done before, and how many of these seconds were spent on repeating steps. From the same runs' logs comes
the time of a checkpoint, as a percentage of an epoch. The time of writing one line of the run log is
measured separately, as a percentage of the median step.
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

TIMEOUT_S = 900


def kill_one_rank(folder: Path) -> dict[str, float]:
    from ddp_lib import read_run
    from ddp_lib.run_dir.log import read_events

    command = [sys.executable, "-m", "ddp_lib.launch", "train", "--data", "shapes", "--epochs", "2"]
    command += ["--nproc-per-node", "2", "--max-restarts", "1", "--run-dir", str(folder / "run")]
    command += ["--data-dir", str(folder)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    log = folder / "run" / "rank1.jsonl"
    deadline = time.monotonic() + TIMEOUT_S
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
    if process.wait(TIMEOUT_S):
        raise SystemExit(f"the resumed run ended with status {process.returncode}")
    steps = read_run(folder / "run", superseded=True)
    steps = steps[steps["rank"] == 0]
    first, second = steps[steps["start"] == 0], steps[steps["start"] == 1]
    new = second[second["step"] > first["step"].max()].iloc[0]
    repeated = second[second["step"] <= first["step"].max()]["step_s"].sum()
    events = read_events(folder / "run")
    written = events[(events["event"] == "checkpoint") & (events["start"] == 0)]["seconds"]
    epoch_s = first[first["epoch"] == 0]["step_s"].sum()
    return {
        "until a new step": float(new["time"] - killed),
        "repeated": float(repeated),
        "checkpoint": float(written.iloc[0]),
        "epoch": float(epoch_s),
        "step": float(first["step_s"].median()),
    }


def log_line_s(lines: int = 2000) -> float:
    """The median seconds that writing one line takes."""
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
    rest_s = [times["until a new step"] - times["repeated"] for times in rounds]
    checkpoint_percent = [100 * times["checkpoint"] / times["epoch"] for times in rounds]
    log_percent = 100 * line_s / statistics.median(times["step"] for times in rounds)
    rows = [
        {
            "name": "from the kill to a new step",
            "unit": "s",
            "runs": [times["until a new step"] for times in rounds],
        },
        {
            "name": "part of it: steps repeated",
            "unit": "s",
            "runs": [times["repeated"] for times in rounds],
        },
        {"name": "part of it: everything else", "unit": "s", "runs": rest_s},
        {"name": "a checkpoint, part of an epoch", "unit": "%", "runs": checkpoint_percent},
        {"name": "a line of the log, part of a step", "unit": "%", "runs": [log_percent]},
    ]
    findings = [
        f"A killed worker costs {statistics.median(rest_s):.1f} s and the steps after the last "
        f"checkpoint; the run log costs {log_percent:.3f} % of a step, a checkpoint "
        f"{statistics.median(checkpoint_percent):.2f} % of an epoch of 10,000 images."
    ]
    what = "Two ranks on the built-in images; one of them is killed in the second epoch."
    result = save("resume", "A killed worker, checkpoints, the log", what, rows, findings)
    print(table(result["rows"]))
    print(*findings, sep="\n")


if __name__ == "__main__":
    main()
