"""The script that torchrun starts in benchmarks/network_setups.py: 20 steps of DDP as in tutorials."""

import gc

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
net = DistributedDataParallel(torch.nn.Linear(1000, 10))
for _ in range(20):
    net(torch.rand(64, 1000)).sum().backward()
print(f"rank {dist.get_rank()} of {dist.get_world_size()} is done", flush=True)
del net
gc.collect()  # or gloo's threads may abort the process at its end
dist.destroy_process_group()
