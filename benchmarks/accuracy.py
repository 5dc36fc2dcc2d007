"""Accuracy by time and by epoch on real images: `fit` beside the conventional loop.

python benchmarks/accuracy.py --data FOLDER [--epochs 10] [--seeds 3]

FOLDER holds train/<class>/* and test/<class>/*, such as CIFAR-10's images. Both sides train the same
SimpleModel for the same epochs, with the same schedule, on two ranks of one thread, one after the
other for each seed; the conventional loop has the number of workers that is fastest here. Time is time
spent training; evaluation is not counted on either side.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from report import save, table
from throughput import ENVIRONMENT, HERE, RANKS, best_workers

LIMIT_S = 8 * 3600
LEVELS = (0.80, 0.85, 0.90)
Curve = list[tuple[float, float]]  # seconds trained, test accuracy; one pair an epoch


def run(command: list[str]) -> str:
    done = subprocess.run(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, timeout=LIMIT_S, check=True
    )
    return done.stdout


def ours(data: str, data_dir: str, epochs: int, seed: int) -> Curve:
    from ddp_lib import read_run
    from ddp_lib.run_dir.log import read_events

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ddp_lib.launch", "train", "--data", data]
        command += ["--data-dir", data_dir, "--nproc-per-node", str(RANKS), "--run-dir", folder]
        run([*command, "--epochs", str(epochs), "--seed", str(seed)])
        log, events = read_run(folder), read_events(folder)
    trained = log[log["rank"] == 0].groupby("epoch")["step_s"].sum().cumsum()
    accuracy = events[events["event"] == "epoch"]["test_accuracy"]
    return list(zip(trained.tolist(), accuracy.tolist(), strict=True))


def conventional(data: str, data_dir: str, epochs: int, seed: int, workers: int) -> Curve:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(RANKS), str(HERE / "contenders" / "conventional.py")]
    command += ["--data", data, "--data-dir", data_dir, "--epochs", str(epochs)]
    command += ["--seed", str(seed), "--workers", str(workers)]
    line = next(line for line in run(command).splitlines() if line.startswith("{"))
    return [(one["seconds"], one["accuracy"]) for one in json.loads(line)["epochs"]]


def seconds_to(level: float, curve: Curve) -> float | None:
    return next((seconds for seconds, accuracy in curve if accuracy >= level), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", required=True, help="folder of images")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    if not Path(options.data, "train").is_dir():
        parser.error(f"--data {options.data!r} holds no folder train/: name a folder of images")
    curves: dict[str, list[Curve]] = {"ddp-launch train": [], "conventional loop": []}
    with tempfile.TemporaryDirectory() as data_dir:
        workers = best_workers(data_dir)[0]
        for seed in range(options.seeds):
            given = (options.data, data_dir, options.epochs, seed)
            curves["ddp-launch train"].append(ours(*given))
            curves["conventional loop"].append(conventional(*given, workers))
    rows: list[dict[str, Any]] = []
    for name, all_seeds in curves.items():
        last = [100 * curve[-1][1] for curve in all_seeds]
        rows.append({"name": f"{name}: final accuracy", "unit": "%", "runs": last})
        for level in LEVELS:
            times = [t for t in (seconds_to(level, curve) for curve in all_seeds) if t is not None]
            if times:
                label = f"{name}: time to {level:.0%} (reached by {len(times)} of {len(all_seeds)})"
                rows.append({"name": label, "unit": "s", "runs": times})
    main = []
    for level in LEVELS:
        mine, other = [[seconds_to(level, curve) for curve in both] for both in curves.values()]
        if None in mine:
            continue
        # A run that never came so far would have taken longer than it did.
        longest = [curve[-1][0] for curve in curves["conventional loop"]]
        filled = [t if t is not None else end for t, end in zip(other, longest, strict=True)]
        ratio = statistics.median(mine) / statistics.median(filled)  # type: ignore[type-var]
        bound = "at most " if None in other else ""
        main.append(f"time to {level:.0%} is {bound}{ratio:.2f} of the conventional loop's")
    mean = [statistics.mean(curve[-1][1] for curve in both) for both in curves.values()]
    main.append(
        f"final accuracy, mean of {options.seeds} seeds, {mean[0]:.2%} beside {mean[1]:.2%}"
    )
    findings = ["; ".join(main) + "."]
    for name, all_seeds in curves.items():
        by_epoch = ", ".join(
            f"{statistics.median(curve[epoch][1] for curve in all_seeds):.1%}"
            for epoch in range(options.epochs)
        )
        findings.append(f"{name}, accuracy by epoch (median of seeds): {by_epoch}.")
    result = save(
        "accuracy",
        "Accuracy on real images",
        f"{options.epochs} epochs of the images folder, {options.seeds} seeds, two ranks.",
        rows,
        findings,
    )
    print(table(result["rows"]))
    print(*findings, sep="\n")


if __name__ == "__main__":
    main()
