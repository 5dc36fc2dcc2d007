"""Distributed data parallel training with PyTorch on several machines.

The public names are listed in __init__.pyi. They are loaded when first used, so that `import ddp_lib`
costs almost nothing and starts nothing.
"""

import os

import lazy_loader

# torch reads this when it loads. Without it, its C++ side prints a page of warnings for each attempt to
# reach a master that is not up yet. A value that you set is kept.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# The same for torch.profiler, which would print two lines per use, and one that there is no GPU.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

__version__ = "1.0.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def load_ipython_extension(shell: object) -> None:
    """%load_ext ddp_lib: the magics %ranks and %%ranks."""
    from ddp_lib.notebook.magic import RanksMagics

    shell.register_magics(RanksMagics)  # type: ignore[attr-defined]
