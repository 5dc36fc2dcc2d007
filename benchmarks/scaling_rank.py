"""One rank of benchmarks/scaling.py: measures links and steps, and rank 0 prints one JSON line.

Three things, one after the other: bare all-reduces; steps of a model that is not wrapped, on all
ranks at once, so that they share the cores as in training but send nothing; DDP's steps.
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

BATCH = 64  # images a rank
LIMIT_S = 500  # then it says where it stands, and ends
WHOLE_MB = 100  # a bucket of this size holds all of SimpleModel's gradients
WARM = 3  # steps not counted: DDP builds its buckets anew, PowerSGD starts
# Bytes, as buckets have them: what is smaller than the burst that a shaped link lets through (64 kB)
# would say nothing about its rate.
SIZES = (256 << 10, 1 << 20, 4 << 20)
# Ranks that share this machine's cores wait for their turns longer than the bytes take: only a large
# tensor shows its bytes, and only many runs a median. Both would take minutes on a slow link.
LOCAL_SIZES, LOCAL_REPEATS = (*SIZES, 16 << 20), 15


def add_hook(model: DistributedDataParallel, name: str) -> None:
    if name == "fp16":
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif name == "PowerSGD":
        state = powerSGD_hook.PowerSGDState(None, start_powerSGD_iter=2, min_compression_rate=1)
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


def steps(net: torch.nn.Module, optimizer: Any, count: int) -> list[tuple[float, float]]:
    """Seconds of each step, and of its backward."""
    x = torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (BATCH,))
    found = []
    for _ in range(WARM + count):
        began = time.perf_counter()
        loss = F.cross_entropy(net(x), y)
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter() - forward
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append((time.perf_counter() - began, backward))
    return found[WARM:]


def measure(
    hook: str, count: int, sizes: Sequence[int] = SIZES, repeats: int = 5
) -> dict[str, Any]:
    """What this rank found; all-reduces and steps as the slowest rank saw them."""
    torch.set_num_threads(1)
    with World.join(log=lambda line: None) as world:
        torch.manual_seed(0)
        bare = SimpleModel().to(memory_format=torch.channels_last)
        alone = steps(bare, make_optimizer(TrainConfig(), bare), count)
        found: dict[str, Any] = {
            "gradient_bytes": sum(4 * p.numel() for p in bare.parameters()),
            "compute_s": statistics.median(step for step, _ in alone),
            "backward_s": statistics.median(backward for _, backward in alone),
        }
        if world.world_size > 1:
            found["all_reduce_s"] = measure_all_reduce(world, sizes, repeats)
            # PowerSGD starts more all-reduces when its first one ends. With two buckets the ranks may
            # do so in different orders, and gloo then pairs the wrong ones: an abort, or a hang.
            cap_mb = WHOLE_MB if hook == "PowerSGD" else None
            net = DistributedDataParallel(bare, gradient_as_bucket_view=True, bucket_cap_mb=cap_mb)
            add_hook(net, hook)
            dist.barrier()
            found["step_s"] = [s for s, _ in steps(net, make_optimizer(TrainConfig(), net), count)]
            every = [None] * world.world_size
            dist.all_gather_object(every, (found["compute_s"], found["backward_s"]))
            found["compute_s"], found["backward_s"] = max(every)  # type: ignore[type-var]
            del net
        else:
            found["step_s"] = [s for s, _ in alone]
        del bare
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--hook", default="none")
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    os.chdir(tempfile.gettempdir())
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    result = measure(options.hook, options.steps)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(result), flush=True)
