"""Distributed data parallel training with PyTorch on several machines.

The public names stand in __init__.pyi. They load on first use, so that `import ddp_lib` costs nothing
and starts nothing.
"""

import os

import lazy_loader

# torch reads it when it loads: its C++ side would answer each attempt to reach a master that is not
# up yet with a page of warnings. Your own setting wins.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# The same for torch.profiler, which would write two lines per use, and one that there is no GPU.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

__version__ = "1.0.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
