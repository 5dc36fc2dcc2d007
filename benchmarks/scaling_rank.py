"""One rank of benchmarks/scaling.py: measures links and steps; rank 0 prints one JSON line.

It measures steps of the model without DDP, on all ranks at once, so that they share the cores as in
training but send nothing. Then it measures all-reduces alone, and then steps with DDP.
"""

import argparse
import faulthandler
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from ddp_lib import SimpleModel, TrainConfig, World
from ddp_lib.report.scaling import measure_all_reduce
from ddp_lib.training.optim import make_optimizer

BATCH = 64  # images per rank
TIMEOUT_S = 500  # then the rank prints its stack and ends
SINGLE_BUCKET_MB = 100  # a bucket of this size holds all gradients of SimpleModel
WARMUP = 3  # steps not counted: DDP rebuilds its buckets, and PowerSGD starts
# Bytes, about the sizes of buckets. A link that is limited to a rate lets a burst of 64 kB through, so
# smaller tensors would say nothing about its rate.
SIZES = (256 << 10, 1 << 20, 4 << 20)
# Ranks that share this machine's cores wait longer for a core than for the bytes. So the bytes only show
# with a large tensor, and the median is only stable over many runs. Both would take minutes on a slow link.
LOCAL_SIZES, LOCAL_REPEATS = (*SIZES, 16 << 20), 15


def add_hook(model: DistributedDataParallel, name: str) -> None:
    if name == "fp16":
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif name == "PowerSGD":
        state = powerSGD_hook.PowerSGDState(None, start_powerSGD_iter=2, min_compression_rate=1)
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


def time_steps(net: torch.nn.Module, optimizer: Any, count: int) -> list[tuple[float, float]]:
    """Seconds of each step and of its backward; the first WARMUP steps are not counted."""
    x = torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (BATCH,))
    seconds = []
    for _ in range(WARMUP + count):
        start = time.perf_counter()
        loss = F.cross_entropy(net(x), y)
        forward_end = time.perf_counter()
        loss.backward()
        backward = time.perf_counter() - forward_end
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append((time.perf_counter() - start, backward))
    return seconds[WARMUP:]


def measure(hook: str, count: int, sizes: Sequence[int] = SIZES, repeats: int = 5) -> dict[str, Any]:
    """This rank's measurements; the times of all-reduces, and of compute, are those of the slowest rank."""
    torch.set_num_threads(1)
    with World.join(log=lambda line: None) as world:
        torch.manual_seed(0)
        model = SimpleModel().to(memory_format=torch.channels_last)
        alone = time_steps(model, make_optimizer(TrainConfig(), model), count)
        measured: dict[str, Any] = {
            "gradient_bytes": sum(4 * p.numel() for p in model.parameters()),
            "compute_s": statistics.median(step for step, _ in alone),
            "backward_s": statistics.median(backward for _, backward in alone),
        }
        if world.world_size > 1:
            measured["all_reduce_s"] = measure_all_reduce(world, sizes, repeats)
            # PowerSGD starts more all-reduces when its first all-reduce ends. With two buckets the ranks
            # may do so in different orders; gloo then matches the wrong ones, and aborts or hangs.
            cap_mb = SINGLE_BUCKET_MB if hook == "PowerSGD" else None
            net = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=cap_mb)
            add_hook(net, hook)
            dist.barrier()
            with_ddp = time_steps(net, make_optimizer(TrainConfig(), net), count)
            measured["step_s"] = [step for step, _ in with_ddp]
            all_ranks = [None] * world.world_size
            dist.all_gather_object(all_ranks, (measured["compute_s"], measured["backward_s"]))
            measured["compute_s"], measured["backward_s"] = max(all_ranks)  # type: ignore[type-var]
            del net
        else:
            measured["step_s"] = [step for step, _ in alone]
        del model
    return measured


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--hook", default="none")
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    os.chdir(tempfile.gettempdir())
    faulthandler.dump_traceback_later(TIMEOUT_S, exit=True)
    result = measure(options.hook, options.steps)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(result), flush=True)
