"""Images/s of `fit` on two ranks, of what a user would otherwise write, and of the limit.

python benchmarks/throughput.py [--rounds 5] [--steps 38]

Each round runs every contender once, one after the other, on two ranks with one thread each: the same
SimpleModel, SGD, 256 images per step, random crops and flips, on the built-in images. The first five steps
are not counted.

The limit computes forward, backward and optimizer step on one constant batch, in both processes at the
same time, without communication, data or log, in the fastest of {fp32, bf16} x {NCHW, channels_last}.
There are two more limits. In one the process keeps its freed memory, as in `fit`. The other also has an
all-reduce of one number after each step; it shows what waiting for the slower rank costs even before a
gradient is sent.

The three contenders run a second time with bf16 autocast, channels_last and tensors instead of pictures.
Beside the limit stands what a product of two bf16 matrices reaches on the same cores.

accelerate and Lightning need benchmarks/requirements.txt. If they are not installed, their rows are left
out, and the findings say so.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import save, table

from ddp_lib import TrainConfig

HERE = Path(__file__).parent
RANKS, GLOBAL_BATCH, FIRST = 2, TrainConfig().global_batch_size, 5
TIMEOUT_S = 600
KEEP_MEMORY = "limit, freed memory kept"
SYNCHRONIZED = "limit, freed memory kept, an all-reduce after each step"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
CONTENDERS = {
    "the conventional loop": ("conventional.py", None),
    "accelerate": ("with_accelerate.py", "accelerate"),
    "Lightning": ("with_lightning.py", "lightning"),
}
FAST = ", bf16, channels_last, tensors"


def images_per_s(ended: list[float]) -> float:
    """Images/s over all ranks, from the end of step FIRST to the end of the last step."""
    return GLOBAL_BATCH * (len(ended) - 1 - FIRST) / (ended[-1] - ended[FIRST])


def run(command: list[str]) -> str:
    done = subprocess.run(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=True
    )
    return done.stdout


def contender(script: str, steps: int, workers: int, data_dir: str, fast: bool = False) -> float:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(RANKS), str(HERE / "contenders" / script)]
    command += ["--steps", str(steps), "--workers", str(workers), "--data-dir", data_dir]
    command += ["--fast"] if fast else []
    line = next(line for line in run(command).splitlines() if line.startswith("{"))
    return images_per_s(json.loads(line)["ended"])


def best_workers(data_dir: str, fast: bool = False) -> tuple[int, list[int]]:
    """The number of DataLoader workers with which the conventional loop is fastest, and those tried."""
    from ddp_lib.data.dataset import load_dataset

    load_dataset("shapes", data_dir, log=lambda line: None)
    speeds = {n: contender("conventional.py", 30, n, data_dir, fast) for n in (0, 1, 2)}
    return max(speeds, key=lambda n: speeds[n]), list(speeds)


def ours(steps: int, data_dir: str) -> float:
    from ddp_lib import read_run

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ddp_lib.launch", "train", "--data", "shapes"]
        command += ["--nproc-per-node", str(RANKS), "--data-dir", data_dir, "--epochs", "1"]
        run([*command, "--run-dir", folder, "--checkpoint-every-s", "600"])
        log = read_run(folder)
    return images_per_s(log[log["rank"] == 0]["time"].tolist()[:steps])


def constant_batch(
    precision: str,
    layout: str,
    steps: int,
    keep_memory: bool = False,
    synchronize: bool = False,
) -> list[float]:
    """Runs on each rank; returns when each step ended, in seconds."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F

    from ddp_lib import SimpleModel
    from ddp_lib.distributed.device import keep_freed_memory

    torch.set_num_threads(1)
    if keep_memory:
        keep_freed_memory()
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    model = SimpleModel().to(memory_format=memory_format)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    x = torch.randn(GLOBAL_BATCH // RANKS, 3, 32, 32).to(memory_format=memory_format)
    y = torch.randint(0, 10, (len(x),))
    if synchronize:
        dist.init_process_group("gloo")
    ended = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(x)
        F.cross_entropy(logits.float(), y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if synchronize:
            dist.all_reduce(torch.ones(1))
        ended.append(time.perf_counter())
    return ended


def limit(
    precision: str,
    layout: str,
    steps: int,
    keep_memory: bool = False,
    synchronize: bool = False,
) -> float:
    """Images/s over both ranks on a constant batch."""
    from ddp_lib import run_ranks

    arguments = (precision, layout, steps, keep_memory, synchronize)
    ranks = run_ranks(constant_batch, RANKS, *arguments, timeout_s=TIMEOUT_S)
    return statistics.mean(images_per_s(ended) for ended in ranks)


def rates() -> tuple[float, float]:
    """Runs on each rank: FLOP/s of a product of two bf16 matrices, and the FLOPs of an image, forward and
    backward."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from ddp_lib import SimpleModel

    torch.set_num_threads(1)
    side = 2048
    a, b = (torch.randn(side, side, dtype=torch.bfloat16) for _ in range(2))
    took = []
    for _ in range(10):
        began = time.perf_counter()
        a @ b
        took.append(time.perf_counter() - began)
    with FlopCounterMode(display=False) as counter:
        SimpleModel()(torch.randn(2, 3, 32, 32)).sum().backward()
    return 2 * side**3 / statistics.median(took), counter.get_total_flops() / 2


def step_parts(steps: int, data_dir: str) -> list[dict[str, float]]:
    """Runs on each rank; returns the seconds of each part of each step after the first FIRST steps.

    Every second step does not communicate.
    """
    import torch
    import torch.nn.functional as F

    from ddp_lib import SimpleModel, World
    from ddp_lib.data.batch import make_batch
    from ddp_lib.data.dataset import load_dataset
    from ddp_lib.data.sampler import TrainSampler
    from ddp_lib.distributed.device import keep_freed_memory
    from ddp_lib.run_dir.log import RunLog
    from ddp_lib.training.ddp import wrap
    from ddp_lib.training.optim import autocast, make_optimizer, pick_precision

    torch.set_num_threads(1)
    keep_freed_memory()
    parts: list[dict[str, float]] = []
    data = load_dataset("shapes", data_dir, log=lambda line: None)
    with World.join(log=lambda line: None) as world, tempfile.TemporaryDirectory() as folder:
        precision, _ = pick_precision("auto", world.device)
        model = SimpleModel().to(memory_format=torch.channels_last)
        net, optimizer = wrap(model, world), make_optimizer(TrainConfig(), model)
        log = RunLog(Path(folder), world.rank)
        sampler = TrainSampler(len(data.train), GLOBAL_BATCH, world.rank, world.world_size)
        for step, indices in enumerate(sampler):
            if step == steps:
                break
            marks = [time.perf_counter()]
            x, y = make_batch(data.train, indices, data, augment=(0, 0))
            marks.append(time.perf_counter())
            # Every second step sends nothing; the difference shows what communication costs.
            with torch.enable_grad() if step % 2 else net.no_sync():
                with autocast(precision, world.device):
                    logits = net(x)
                loss = F.cross_entropy(logits.float(), y)
                marks.append(time.perf_counter())
                loss.backward()
            marks.append(time.perf_counter())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            marks.append(time.perf_counter())
            log.write(step=step, loss=loss.item(), lr=0.1, data_s=0.1, compute_s=0.1, time=0.1)
            marks.append(time.perf_counter())
            backward = "backward and all-reduce" if step % 2 else "backward"
            names = ("data", "forward", backward, "optimizer", "log")
            pairs = zip(names, marks, marks[1:], strict=False)
            parts.append({name: end - begin for name, begin, end in pairs})
        del net, model, optimizer
    return parts[FIRST:]


def where_time_goes(steps: int, data_dir: str) -> str:
    from ddp_lib import run_ranks

    parts = [p for rank in run_ranks(step_parts, RANKS, steps, data_dir, timeout_s=TIMEOUT_S) for p in rank]

    def ms(name: str) -> float:
        return 1000 * statistics.median(part[name] for part in parts if name in part)

    exposed = ms("backward and all-reduce") - ms("backward")
    times = {"data": ms("data"), "forward": ms("forward"), "backward": ms("backward")}
    times |= {"communication not hidden": exposed, "optimizer": ms("optimizer"), "log": ms("log")}
    text = ", ".join(f"{name} {value:.2f} ms" for name, value in times.items())
    return f"Where a step's time goes (medians over both ranks): {text}."


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=38)
    options = parser.parse_args()
    from ddp_lib import run_ranks

    contenders = {
        name: script
        for name, (script, package) in CONTENDERS.items()
        if package is None or importlib.util.find_spec(package)
    }
    with tempfile.TemporaryDirectory() as data_dir:
        workers, workers_tried = best_workers(data_dir)
        fast_workers, _ = best_workers(data_dir, fast=True)
        combinations = [
            (precision, layout) for precision in ("fp32", "bf16") for layout in ("NCHW", "channels_last")
        ]
        speeds = {each: limit(*each, FIRST + 6) for each in combinations}
        best = max(speeds, key=lambda each: speeds[each])
        runs: dict[str, list[float]] = {"ddp-launch train": []}
        runs |= {name: [] for name in contenders}
        runs |= {name + FAST: [] for name in contenders}
        runs |= {"limit": [], KEEP_MEMORY: [], SYNCHRONIZED: []}
        multiply: list[tuple[float, float]] = []
        for _ in range(options.rounds):
            runs["ddp-launch train"].append(ours(options.steps, data_dir))
            for name, script in contenders.items():
                runs[name].append(contender(script, options.steps, workers, data_dir))
                runs[name + FAST].append(contender(script, options.steps, fast_workers, data_dir, fast=True))
            runs["limit"].append(limit(*best, options.steps))
            runs[KEEP_MEMORY].append(limit(*best, options.steps, keep_memory=True))
            runs[SYNCHRONIZED].append(limit(*best, options.steps, keep_memory=True, synchronize=True))
            multiply += run_ranks(rates, RANKS, timeout_s=TIMEOUT_S)
        parts = where_time_goes(options.steps, data_dir)
    rate, flops = statistics.median(rate for rate, _ in multiply), multiply[0][1]
    median = {name: statistics.median(values) for name, values in runs.items()}
    speed = median["ddp-launch train"]
    computed = flops * median[KEEP_MEMORY] / RANKS
    ratios = [f"{speed / median[name]:.2f} times as many as {name}" for name in contenders]
    fast = [f"{speed / median[name + FAST]:.2f} times those of {name}" for name in contenders]
    findings = [
        f"`ddp-launch train` trains {speed:,.0f} images/s: {', '.join(ratios)}. This is "
        f"{speed / median['limit']:.2f} of the limit, {speed / median[KEEP_MEMORY]:.2f} of the limit if "
        f"freed memory is kept, and {speed / median[SYNCHRONIZED]:.2f} of the limit if there is also an "
        "all-reduce after each step. If the others too compute in bf16 and channels_last, on images that "
        f"stay tensors: {', '.join(fast)}. What is left is ours; the rest of the factor is the recipe."
    ]
    findings += [f"{name} is not installed, and left out." for name in CONTENDERS if name not in contenders]
    findings += [
        f"An image takes {flops / 1e6:.0f} million floating-point operations, forward and backward: the "
        f"limit with freed memory kept computes {computed / 1e9:.0f} GFLOP/s per core, "
        f"{computed / rate:.2f} of what a product of two bf16 matrices of 2048 x 2048 does on the same "
        f"cores ({rate / 1e9:.0f}).",
        f"The limit is highest with {best[0]} in {best[1]}; the conventional loop is fastest with "
        f"{workers} workers (tried: {', '.join(map(str, workers_tried))}).",
        parts,
    ]
    result = save(
        "throughput",
        "Throughput of two ranks",
        "Images/s over both ranks, one thread per rank; each round runs all contenders in turn.",
        [{"name": name, "unit": "images/s", "runs": values} for name, values in runs.items()],
        findings,
    )
    print(table(result["rows"]))
    print(*findings, sep="\n")


if __name__ == "__main__":
    main()
