"""Accuracy by time and by epoch on real images: `fit` and the conventional loop.

python benchmarks/accuracy.py --data FOLDER [--seeds 3] [--other CHECKOUT] [--wide EPOCHS] [--keep FOLDER]

FOLDER holds train/<class>/* and test/<class>/*, such as CIFAR-10's images. Both train the same
SimpleModel for the same number of epochs, with the same recipe, on two ranks with one thread each. They run
one after the other; the conventional loop trains with the first seed only, with the number of workers that is
fastest on this machine. Only time spent training counts, not evaluation. --other: a checkout of another
version, whose `fit` with its own defaults takes turns with this one's. --wide: WideModel too, for so many
epochs.

Three seeds take hours. Each run is kept in a file of --keep as soon as it is done, with its machine, and is
not done again there: after a stop, the same command goes on.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from report import machine, save, table, versions
from throughput import ENVIRONMENT, HERE, RANKS, best_workers

from ddp_lib import TrainConfig

TIMEOUT_S = 8 * 3600
WIDE_MODEL = "ddp_lib.model:WideModel"
LEVELS = (0.80, 0.85, 0.90)
OURS, CONVENTIONAL = "ddp-launch train", "conventional loop"
OTHER, WIDE = "ddp-launch train of the other version", "ddp-launch train, WideModel"
Curve = list[tuple[float, float]]  # one pair per epoch: seconds trained, test accuracy


def run(command: list[str], checkout: str = "") -> str:
    environment = ENVIRONMENT | ({"PYTHONPATH": checkout} if checkout else {})
    done = subprocess.run(
        command,
        env=environment,
        cwd=checkout or None,  # where -m looks first
        stdout=subprocess.PIPE,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    return done.stdout


def ours(data: str, data_dir: str, seed: int, flags: str = "", checkout: str = "") -> Curve:
    from ddp_lib import read_run
    from ddp_lib.run_dir.log import read_events

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ddp_lib.launch", "train", "--data", data]
        command += ["--data-dir", data_dir, "--nproc-per-node", str(RANKS), "--run-dir", folder]
        run([*command, *flags.split(), "--seed", str(seed)], checkout)
        log, events = read_run(folder), read_events(folder)
    trained = log[log["rank"] == 0].groupby("epoch")["step_s"].sum().cumsum()
    accuracy = events[events["event"] == "epoch"]["test_accuracy"]
    return list(zip(trained.tolist(), accuracy.tolist(), strict=True))


def conventional(data: str, data_dir: str, seed: int, epochs: int, workers: int) -> Curve:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(RANKS), str(HERE / "contenders" / "conventional.py")]
    command += ["--data", data, "--data-dir", data_dir, "--epochs", str(epochs)]
    command += ["--seed", str(seed), "--workers", str(workers)]
    line = next(line for line in run(command).splitlines() if line.startswith("{"))
    return [(epoch["seconds"], epoch["accuracy"]) for epoch in json.loads(line)["epochs"]]


def kept(folder: Path, side: str, seed: int, train: Callable[[], Curve]) -> Curve:
    """The curve of a run that is kept in `folder`, or else of a new one, which is then kept."""
    about = {"side": side, "seed": seed, "machine": machine(), "versions": versions()}
    path = folder / f"{side.replace(' ', '-')}-seed{seed}.json"
    if path.exists():
        there = json.loads(path.read_text())
        if {name: there[name] for name in about} != about:
            raise SystemExit(f"{path} is of another machine or version: move it away, or name another --keep")
        print(f"{side}, seed {seed}: kept, {there['curve'][-1][1]:.2%}", flush=True)
        return [(seconds, accuracy) for seconds, accuracy in there["curve"]]
    curve = train()
    path.write_text(json.dumps({**about, "load": os.getloadavg(), "curve": curve}) + "\n")
    print(f"{side}, seed {seed}: {curve[-1][1]:.2%} in {curve[-1][0]:.0f} s", flush=True)
    return curve


def seconds_to(level: float, curve: Curve) -> float | None:
    """Seconds of training until the accuracy `level`; None if it was not reached."""
    return next((seconds for seconds, accuracy in curve if accuracy >= level), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", required=True, help="folder of images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--other", default="", help="a checkout of another version, to compare with")
    parser.add_argument("--wide", type=int, default=0, metavar="EPOCHS", help="train WideModel too")
    parser.add_argument("--keep", type=Path, default=Path("runs/accuracy"), help="folder of finished runs")
    options = parser.parse_args()
    if not Path(options.data, "train").is_dir():
        parser.error(f"--data {options.data!r} holds no folder train/: name a folder of images")
    options.keep.mkdir(parents=True, exist_ok=True)
    curves: dict[str, list[Curve]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as data_dir:
        workers = best_workers(data_dir)[0]
        for seed in range(options.seeds):
            arguments = (str(Path(options.data).resolve()), data_dir, seed)
            ways: dict[str, Callable[[], Curve]] = {OURS: partial(ours, *arguments)}
            if options.other:
                ways[OTHER] = partial(ours, *arguments, checkout=options.other)
            if options.wide:
                ways[WIDE] = partial(ours, *arguments, f"--model {WIDE_MODEL} --epochs {options.wide}")
            if seed == 0:
                ways[CONVENTIONAL] = partial(conventional, *arguments, TrainConfig().epochs, workers)
            for side, way in ways.items():
                curves[side].append(kept(options.keep, side, seed, way))
    rows: list[dict[str, Any]] = []
    for name, all_seeds in curves.items():
        last = [100 * curve[-1][1] for curve in all_seeds]
        rows.append({"name": f"{name}: final accuracy", "unit": "%", "runs": last})
        rows.append({"name": f"{name}: training", "unit": "s", "runs": [curve[-1][0] for curve in all_seeds]})
        for level in LEVELS:
            times = [t for t in (seconds_to(level, curve) for curve in all_seeds) if t is not None]
            if times:
                label = f"{name}: time to {level:.0%} (reached by {len(times)} of {len(all_seeds)})"
                rows.append({"name": label, "unit": "s", "runs": times})
    mean = {side: statistics.mean(curve[-1][1] for curve in seeds) for side, seeds in curves.items()}
    seconds = {side: statistics.median(curve[-1][0] for curve in seeds) for side, seeds in curves.items()}
    others = [
        f"{mean[side]:.2%} with {side} ({len(all_seeds)}), in {seconds[side] / seconds[OURS]:.2f} of the time"
        for side, all_seeds in curves.items()
        if side != OURS
    ]
    findings = [
        f"Final accuracy, mean of {options.seeds} seeds: {mean[OURS]:.2%}; {'; '.join(others)}. Each test "
        "image is shown once, as it is."
    ]
    for name, all_seeds in curves.items():
        by_epoch = ", ".join(
            f"{statistics.median(accuracies):.1%}"
            for accuracies in zip(*([accuracy for _, accuracy in curve] for curve in all_seeds), strict=True)
        )
        findings.append(f"{name}, accuracy by epoch (median of seeds): {by_epoch}.")
    result = save(
        "accuracy",
        "Accuracy on real images",
        f"{TrainConfig().epochs} epochs on the folder of images, {options.seeds} seeds, two ranks.",
        rows,
        findings,
    )
    print(table(result["rows"]))
    print(*findings, sep="\n")


if __name__ == "__main__":
    main()
