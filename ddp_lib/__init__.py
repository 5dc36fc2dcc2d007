"""Distributed data parallel training with PyTorch on several machines.

The names below load on first use, so that `import ddp_lib` costs nothing and starts nothing.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddp_lib.config import TrainConfig
    from ddp_lib.errors import UserError
    from ddp_lib.evaluation import evaluate
    from ddp_lib.model import SimpleModel
    from ddp_lib.notebook import run_ranks
    from ddp_lib.plots import plot_run
    from ddp_lib.rank_error import RankError
    from ddp_lib.rehearsal import NodeResult, run_nodes
    from ddp_lib.runlog import read_events, read_run
    from ddp_lib.train import fit
    from ddp_lib.world import World

# torch reads it when it loads: its C++ side would answer each attempt to reach a master that is not
# up yet with a page of warnings. Your own setting wins.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# The same for torch.profiler, which would write two lines a use, and one that there is no GPU.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

__version__ = "1.0.0"

_HOME = {
    "NodeResult": "rehearsal",
    "RankError": "rank_error",
    "SimpleModel": "model",
    "TrainConfig": "config",
    "UserError": "errors",
    "World": "world",
    "evaluate": "evaluation",
    "fit": "train",
    "plot_run": "plots",
    "read_events": "runlog",
    "read_run": "runlog",
    "run_nodes": "rehearsal",
    "run_ranks": "notebook",
}

__all__ = [
    "NodeResult",
    "RankError",
    "SimpleModel",
    "TrainConfig",
    "UserError",
    "World",
    "evaluate",
    "fit",
    "plot_run",
    "read_events",
    "read_run",
    "run_nodes",
    "run_ranks",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ddp_lib' has no attribute {name!r}")
    return getattr(import_module(f"ddp_lib.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
