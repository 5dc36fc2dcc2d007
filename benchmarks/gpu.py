"""Training on GPUs, one rank per GPU: images/s, the fraction of the limit, and the time to 94 %.

python benchmarks/gpu.py --data FOLDER [--epochs 40] [--rounds 3] [--no-compile] [--cpu]

FOLDER holds train/<class>/* and test/<class>/*, such as CIFAR-10's images. The model is WideModel, with
1,024 images per step over all GPUs, in bf16 if the GPU supports it. A round trains once without --compile
and once with it. It also measures the limit: forward, backward and optimizer step on one constant batch,
on all GPUs at the same time, without communication, data or log. Images/s are measured from the second
epoch on. On a machine without a GPU it says so, and writes nothing.

--data shapes trains on the built-in images, and --cpu a small model on the CPU, to try this script: both
only print the table.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from report import save, table

from ddp_lib.model import SimpleModel, WideModel

HERE = Path(__file__).parent
GLOBAL_BATCH, LR, LEVEL = 1024, 0.8, 0.94
TIMEOUT_S = 3600


def train(options: argparse.Namespace, gpus: int, compiled: bool) -> tuple[float, float, float | None]:
    """Images/s, the final accuracy, and seconds of training until LEVEL (None: not reached)."""
    from ddp_lib import read_run
    from ddp_lib.run_dir.log import read_events

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ddp_lib.launch", "train", "--run-dir", folder]
        command += ["--data", options.data if options.data == "shapes" else str(Path(options.data).resolve())]
        command += [] if options.cpu else ["--model", "ddp_lib.model:WideModel"]
        command += ["--data-dir", str(HERE.parent / "data")]
        command += ["--nproc-per-node", str(gpus), "--global-batch-size", str(GLOBAL_BATCH)]
        command += ["--epochs", str(options.epochs), "--lr", str(LR), "--weight-decay", "5e-4"]
        command += ["--label-smoothing", "0.1", "--compile", str(compiled)]
        command += ["--timeout-s", "600"]  # compiling takes long
        subprocess.run(command, cwd=HERE, check=True, timeout=TIMEOUT_S, stdout=subprocess.DEVNULL)
        log, events = read_run(folder), read_events(folder)
    log = log[log["rank"] == 0]
    later = log[log["epoch"] > 0]
    speed = GLOBAL_BATCH * len(later) / later["step_s"].sum()
    trained = log.groupby("epoch")["step_s"].sum().cumsum()
    accuracy = events[events["event"] == "epoch"]["test_accuracy"]
    reached = [s for s, a in zip(trained, accuracy, strict=True) if a >= LEVEL]
    return speed, accuracy.iloc[-1], reached[0] if reached else None


def limit(devices: list[torch.device], steps: int = 100) -> float:
    """Images/s of all devices on a constant batch."""
    replicas = []
    for device in devices:
        model = WideModel() if device.type == "cuda" else SimpleModel()
        model.to(device, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, fused=True)
        x = torch.randn(GLOBAL_BATCH // len(devices), 3, 32, 32, device=device)
        y = torch.randint(0, 10, (len(x),), device=device)
        replicas.append((model, optimizer, x.to(memory_format=torch.channels_last), y))
    began = 0.0
    for step in range(10 + steps):
        if step == 10:  # in the first steps cuDNN chooses the convolutions' algorithms
            wait(devices)
            began = time.perf_counter()
        for model, optimizer, x, y in replicas:
            with torch.autocast(x.device.type, torch.bfloat16):
                logits = model(x)
            torch.nn.functional.cross_entropy(logits.float(), y).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    wait(devices)
    return GLOBAL_BATCH * steps / (time.perf_counter() - began)


def wait(devices: list[torch.device]) -> None:
    """Until they have done their work."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", required=True, help="folder of images")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-compile", action="store_true", help="leave out what trains with --compile")
    parser.add_argument("--cpu", action="store_true", help="try this script on the CPU")
    options = parser.parse_args()
    gpus = 0 if options.cpu else torch.cuda.device_count()
    if not (gpus or options.cpu):
        print("No GPU on this machine: nothing was measured, and RESULTS.md gets no table of it.")
        return
    devices = [torch.device("cuda", gpu) for gpu in range(gpus)] or [torch.device("cpu")]
    if options.data != "shapes" and not Path(options.data, "train").is_dir():
        parser.error(f"--data {options.data!r} holds no folder train/: name a folder of images")
    runs: dict[str, list[float]] = defaultdict(list)
    last: dict[str, list[float]] = defaultdict(list)
    reached: dict[str, list[float]] = defaultdict(list)
    for _ in range(options.rounds):
        kinds = ((False, "ddp-launch train"), (True, "the same, --compile True"))
        for compiled, name in kinds[: 1 if options.no_compile else 2]:
            speed, accuracy, seconds = train(options, len(devices), compiled)
            runs[name].append(speed)
            last[name].append(100 * accuracy)
            if seconds is not None:
                reached[name].append(seconds)
        runs["limit: constant batch, not compiled"].append(limit(devices, 5 if options.cpu else 100))
    rows = [{"name": n, "unit": "images/s", "runs": numbers} for n, numbers in runs.items()]
    rows += [{"name": f"{n}: test accuracy", "unit": "%", "runs": a} for n, a in last.items()]
    for name, seconds in reached.items():
        of = f"(reached in {len(seconds)} of {options.rounds})"
        rows.append({"name": f"{name}: time to {LEVEL:.0%} {of}", "unit": "s", "runs": seconds})
    median = {name: statistics.median(numbers) for name, numbers in runs.items()}
    fraction = median["ddp-launch train"] / median["limit: constant batch, not compiled"]
    hardware = "the CPU" if options.cpu else f"{gpus} x {torch.cuda.get_device_name(0)}"
    findings = [
        f"WideModel on {hardware} trains {median['ddp-launch train']:,.0f} images/s, "
        f"{fraction:.2f} of the limit (medians)."
    ]
    findings += [f"{name}: {LEVEL:.0%} was not reached." for name in last if name not in reached]
    what = f"WideModel on {hardware}, {GLOBAL_BATCH} images per step, {options.epochs} epochs."
    if options.data != "shapes" and not options.cpu:
        save("gpu", "Training on GPUs", what, rows, findings)
    print(table(rows))
    print(*findings, sep="\n")


if __name__ == "__main__":
    main()
