"""Images/s of `fit` on two ranks, beside what a user would otherwise write, and beside the limit.

python benchmarks/throughput.py [--rounds 5] [--steps 60]

Each round runs every side once, one after the other, on two ranks of one thread each: the same
SimpleModel, SGD, 128 images a step, random crops and flips, on the built-in images. Counted are the
steps after the tenth. The limit computes forward, backward and step on one constant batch, in both
processes at once, without communication, data or log, in the fastest of {fp32, bf16} x {NCHW,
channels_last}. Two more limits: the same where freed memory stays with the process, as `fit` sets it,
and that with an all-reduce of one number after each step: what waiting for the slower rank costs
before a gradient is sent. Needs benchmarks/requirements.txt for accelerate and Lightning; without them
their rows are left out, and the table says so.
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

HERE = Path(__file__).parent
RANKS, GLOBAL_BATCH, FIRST = 2, 128, 10
LIMIT_S = 600
KEEPING = "limit where freed memory is kept"
MEETING = "the same, and the ranks meet after each step"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
CONTENDERS = {
    "the conventional loop": ("conventional.py", None),
    "accelerate": ("with_accelerate.py", "accelerate"),
    "Lightning": ("with_lightning.py", "lightning"),
}


def images_per_s(ended: list[float]) -> float:
    """Over all ranks, from the end of step FIRST to the end of the last."""
    return GLOBAL_BATCH * (len(ended) - 1 - FIRST) / (ended[-1] - ended[FIRST])


def run(command: list[str]) -> str:
    done = subprocess.run(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, timeout=LIMIT_S, check=True
    )
    return done.stdout


def contender(script: str, steps: int, workers: int, data_dir: str) -> float:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(RANKS), str(HERE / "contenders" / script)]
    command += ["--steps", str(steps), "--workers", str(workers), "--data-dir", data_dir]
    line = next(line for line in run(command).splitlines() if line.startswith("{"))
    return images_per_s(json.loads(line)["ended"])


def best_workers(data_dir: str) -> tuple[int, list[int]]:
    """The number of DataLoader workers that makes the conventional loop fastest, and those tried."""
    from ddp_lib.data.dataset import load_dataset

    load_dataset("shapes", data_dir, log=lambda line: None)
    tried = {w: contender("conventional.py", 30, w, data_dir) for w in (0, 1, 2)}
    return max(tried, key=lambda w: tried[w]), list(tried)


def ours(steps: int, data_dir: str) -> float:
    from ddp_lib import read_run

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ddp_lib.launch", "train", "--data", "shapes"]
        command += ["--nproc-per-node", str(RANKS), "--data-dir", data_dir, "--epochs", "1"]
        run([*command, "--run-dir", folder, "--checkpoint-every-s", "600"])
        log = read_run(folder)
    return images_per_s(log[log["rank"] == 0]["time"].tolist()[:steps])


def constant_batch(
    precision: str, layout: str, steps: int, keep: bool = False, meet: bool = False
) -> list[float]:
    """Runs on each rank: when each step ended."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F

    from ddp_lib import SimpleModel
    from ddp_lib.distributed.device import keep_freed_memory

    torch.set_num_threads(1)
    if keep:
        keep_freed_memory()
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    model = SimpleModel().to(memory_format=form)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    x = torch.randn(GLOBAL_BATCH // RANKS, 3, 32, 32).to(memory_format=form)
    y = torch.randint(0, 10, (len(x),))
    if meet:
        dist.init_process_group("gloo")
    ended = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(x)
        F.cross_entropy(logits.float(), y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if meet:
            dist.all_reduce(torch.ones(1))
        ended.append(time.perf_counter())
    return ended


def limit(best: tuple[str, str], steps: int, keep: bool = False, meet: bool = False) -> float:
    from ddp_lib import run_ranks

    ranks = run_ranks(constant_batch, RANKS, *best, steps, keep, meet, timeout_s=LIMIT_S)
    return statistics.mean(images_per_s(ended) for ended in ranks)


def step_parts(steps: int, data_dir: str) -> list[dict[str, float]]:
    """Runs on each rank: seconds of each part of a step, each step of three made in three ways."""
    import torch
    import torch.nn.functional as F

    from ddp_lib import SimpleModel, TrainConfig, World
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
            # Every second step sends nothing: the difference is what communication costs.
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

    parts = [
        p for rank in run_ranks(step_parts, RANKS, steps, data_dir, timeout_s=LIMIT_S) for p in rank
    ]

    def ms(name: str) -> float:
        return 1000 * statistics.median(part[name] for part in parts if name in part)

    sent = ms("backward and all-reduce") - ms("backward")
    shown = {"data": ms("data"), "forward": ms("forward"), "backward": ms("backward")}
    shown |= {"communication not hidden": sent, "optimizer": ms("optimizer"), "log": ms("log")}
    listed = ", ".join(f"{name} {value:.2f} ms" for name, value in shown.items())
    return f"Where a step's time goes (medians over both ranks): {listed}."


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    sides = {
        name: script
        for name, (script, package) in CONTENDERS.items()
        if package is None or importlib.util.find_spec(package)
    }
    with tempfile.TemporaryDirectory() as data_dir:
        workers, tried = best_workers(data_dir)
        combinations = [
            (precision, layout)
            for precision in ("fp32", "bf16")
            for layout in ("NCHW", "channels_last")
        ]
        speeds = {each: limit(each, FIRST + 6) for each in combinations}
        best = max(speeds, key=lambda each: speeds[each])
        runs: dict[str, list[float]] = {"ddp-launch train": []}
        runs |= {name: [] for name in sides} | {"limit": [], KEEPING: [], MEETING: []}
        for _ in range(options.rounds):
            runs["ddp-launch train"].append(ours(options.steps, data_dir))
            for name, script in sides.items():
                runs[name].append(contender(script, options.steps, workers, data_dir))
            runs["limit"].append(limit(best, options.steps))
            runs[KEEPING].append(limit(best, options.steps, keep=True))
            runs[MEETING].append(limit(best, options.steps, keep=True, meet=True))
        parts = where_time_goes(options.steps, data_dir)
    median = {name: statistics.median(values) for name, values in runs.items()}
    mine = median["ddp-launch train"]
    times = [f"{mine / median[name]:.2f} times as many as {name}" for name in sides]
    findings = [
        f"`ddp-launch train` trains {mine:,.0f} images/s, {', '.join(times)}, and "
        f"{mine / median['limit']:.2f} of the limit, {mine / median[KEEPING]:.2f} of the limit where "
        f"freed memory is kept, {mine / median[MEETING]:.2f} where the ranks meet, too."
    ]
    findings += [f"{name}: not installed, left out." for name in CONTENDERS if name not in sides]
    findings += [
        f"The limit's best is {best[0]} in {best[1]}; the conventional loop's best number of "
        f"workers is {workers} (tried: {', '.join(map(str, tried))}).",
        parts,
    ]
    result = save(
        "throughput",
        "Throughput of two ranks",
        "Images/s over both ranks, one thread each, all sides in turn in each round.",
        [{"name": name, "unit": "images/s", "runs": values} for name, values in runs.items()],
        findings,
    )
    print(table(result["rows"]))
    print(*findings, sep="\n")


if __name__ == "__main__":
    main()
