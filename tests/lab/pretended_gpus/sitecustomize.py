"""Stands in for GPUs: with this folder in PYTHONPATH, torch sees PRETENDED_GPUS of them in every process.

Ranks choose backend and device as on such a machine, and compute on the CPU, with gloo: a tensor that is sent
to a GPU stays where it is. So nothing here refuses to mix devices. Writes to the file PRETENDED_LOG a line of
JSON for each choice: [port of the group's store, rank, "backend" or "device", the choice].
"""

import functools
import importlib.abc
import importlib.util
import json
import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any


def note(what: str, choice: object) -> None:
    line = json.dumps([os.environ.get("MASTER_PORT"), os.environ.get("RANK"), what, str(choice)])
    with open(os.environ["PRETENDED_LOG"], "a") as file:
        file.write(f"{line}\n")


def pretend(torch: Any, gpus: int) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from torch.overrides import TorchFunctionMode

    def is_gpu(value: object) -> bool:
        return isinstance(value, str | torch.device) and str(value).startswith("cuda")

    def gpu(value: object) -> object:
        """What stands for a device or its number, noted."""
        note("device", f"cuda:{value}" if isinstance(value, int) else value)
        return "cpu"

    class StayOnTheCpu(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.device:
                return function(*args, **(kwargs or {}))
            args = [gpu(value) if is_gpu(value) else value for value in args]
            kwargs = {name: gpu(value) if is_gpu(value) else value for name, value in (kwargs or {}).items()}
            return function(*args, **kwargs)

    def ddp(self, module, device_ids=None, *args, **kwargs):
        true_ddp(self, module, None if device_ids and gpu(device_ids[0]) else device_ids, *args, **kwargs)

    @functools.cache  # once per process, and only in one that asks: the others run torch as it is
    def stay_on_the_cpu(process: int) -> None:
        StayOnTheCpu().__enter__()
        DistributedDataParallel.__init__ = ddp

    def device_count() -> int:
        if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            return 0
        stay_on_the_cpu(os.getpid())
        return gpus

    def init_process_group(backend=None, *args, device_id=None, **kwargs):
        note("backend", backend)
        if device_id is not None:
            gpu(device_id)
        return true_group("gloo" if "nccl" in str(backend) else backend, *args, **kwargs)

    true_group, true_ddp = dist.init_process_group, DistributedDataParallel.__init__
    dist.init_process_group = init_process_group
    torch.cuda.device_count = device_count
    torch.cuda.is_available = lambda: device_count() > 0
    torch.accelerator.is_available = lambda: False  # or optimizers would ask its stream
    torch.cuda.get_device_properties = lambda number: SimpleNamespace(uuid=f"GPU-{number}")
    torch.cuda.set_device = gpu


class AfterTorch(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Pretends as soon as torch has been imported, and not before: most processes never do."""

    def find_spec(self, name: str, path: object = None, target: object = None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        self.true, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return self.true.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.true.exec_module(module)
        pretend(module, int(os.environ["PRETENDED_GPUS"]))


if "PRETENDED_GPUS" in os.environ:
    sys.meta_path.insert(0, AfterTorch())
