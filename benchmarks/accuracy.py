"""Accuracy by time and by epoch on real images: `fit` and the conventional loop.

python benchmarks/accuracy.py --data FOLDER [--epochs 10] [--seeds 3]

FOLDER holds train/<class>/* and test/<class>/*, such as CIFAR-10's images. Both train the same
SimpleModel for the same number of epochs, with the same schedule, on two ranks with one thread each. For
each seed they run one after the other. The conventional loop uses the number of workers that is fastest
on this machine. Only time spent training counts, not evaluation.
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

TIMEOUT_S = 8 * 3600
LEVELS = (0.80, 0.85, 0.90)
Curve = list[tuple[float, float]]  # one pair per epoch: seconds trained, test accuracy


def run(command: list[str]) -> str:
    done = subprocess.run(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=True
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
    return [(epoch["seconds"], epoch["accuracy"]) for epoch in json.loads(line)["epochs"]]


def seconds_to(level: float, curve: Curve) -> float | None:
    """Seconds of training until the accuracy `level`; None if it was not reached."""
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
            arguments = (options.data, data_dir, options.epochs, seed)
            curves["ddp-launch train"].append(ours(*arguments))
            curves["conventional loop"].append(conventional(*arguments, workers))
    rows: list[dict[str, Any]] = []
    for name, all_seeds in curves.items():
        last = [100 * curve[-1][1] for curve in all_seeds]
        rows.append({"name": f"{name}: final accuracy", "unit": "%", "runs": last})
        for level in LEVELS:
            times = [t for t in (seconds_to(level, curve) for curve in all_seeds) if t is not None]
            if times:
                label = f"{name}: time to {level:.0%} (reached by {len(times)} of {len(all_seeds)})"
                rows.append({"name": label, "unit": "s", "runs": times})
    main_finding = []
    for level in LEVELS:
        ours_s, conventional_s = (
            [seconds_to(level, curve) for curve in all_seeds] for all_seeds in curves.values()
        )
        if None in ours_s:
            continue
        # A run that did not reach the level would have taken longer than it ran.
        ends = [curve[-1][0] for curve in curves["conventional loop"]]
        at_least = [t if t is not None else e for t, e in zip(conventional_s, ends, strict=True)]
        ratio = statistics.median(ours_s) / statistics.median(at_least)  # type: ignore[type-var]
        bound = "at most " if None in conventional_s else ""
        main_finding.append(f"time to {level:.0%} is {bound}{ratio:.2f} of the conventional loop's")
    mean = [statistics.mean(curve[-1][1] for curve in seeds) for seeds in curves.values()]
    main_finding.append(
        f"final accuracy (mean of {options.seeds} seeds) is {mean[0]:.2%}, and {mean[1]:.2%} with the "
        "conventional loop"
    )
    findings = ["; ".join(main_finding) + "."]
    for name, all_seeds in curves.items():
        by_epoch = ", ".join(
            f"{statistics.median(curve[epoch][1] for curve in all_seeds):.1%}"
            for epoch in range(options.epochs)
        )
        findings.append(f"{name}, accuracy by epoch (median of seeds): {by_epoch}.")
    result = save(
        "accuracy",
        "Accuracy on real images",
        f"{options.epochs} epochs on the folder of images, {options.seeds} seeds, two ranks.",
        rows,
        findings,
    )
    print(table(result["rows"]))
    print(*findings, sep="\n")


if __name__ == "__main__":
    main()
