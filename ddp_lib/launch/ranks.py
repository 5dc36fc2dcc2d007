"""How the ranks of a machine are started: as a fresh Python process per rank, or as forks of one that has
imported what they need."""

import os
import sys
import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ddp_lib.launch import exec_rank
from ddp_lib.launch.options import Launch, ScriptOptions
from ddp_lib.launch.script import Script
from ddp_lib.processes.forkserver import context, run_rank, start_server

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.api import LogsSpecs


class Ranks(Protocol):
    """What torch's agent needs to know to start ranks."""

    @property
    def needs_gpus(self) -> bool:
        """Whether each rank takes a GPU of its own where there are GPUs."""

    @abstractmethod
    def prepare(self) -> None:
        """Called first."""

    @abstractmethod
    def entry(self) -> tuple[Any, tuple[Any, ...], str]:
        """A function or a program, its arguments, and multiprocessing's start method."""

    @abstractmethod
    def logs(self, launch: Launch) -> "LogsSpecs":
        """Where the ranks write."""

    @abstractmethod
    def equal(self, elastic: bool) -> dict[str, Any]:
        """What must be equal on all machines: files (path -> digest), flags, data (digest)."""


@dataclass(frozen=True)
class ForkedRanks(Ranks):
    """Forks of a process that has imported `preload`; each calls `function`, package.module:name.

    describe: what must be equal on all machines. folder: the run's.
    """

    function: str
    args: tuple[Any, ...]
    preload: list[str]
    describe: Callable[[], dict[str, Any]] = dict
    folder: str = ""
    needs_gpus = False  # the ranks decide when they meet

    def prepare(self) -> None:
        start_server(self.preload)

    def entry(self) -> tuple[Any, tuple[Any, ...], str]:
        return run_rank, (self.function, *self.args), context().get_start_method()

    def logs(self, launch: Launch) -> "LogsSpecs":
        from ddp_lib.launch.rank_log import NoLogs

        return NoLogs(launch.local, Path(self.folder))

    def equal(self, elastic: bool) -> dict[str, Any]:
        # The ranks compare this too. But a machine that joins a running job must not get so far.
        return self.describe() if elastic else {}


@dataclass(frozen=True)
class ScriptRanks(Ranks):
    """A program of the reader's."""

    script: Script
    options: ScriptOptions
    needs_gpus = True

    def prepare(self) -> None:
        pass

    def entry(self) -> tuple[Any, tuple[Any, ...], str]:
        prelude = ("-I", "-S", exec_rank.__file__)
        return sys.executable, (*prelude, sys.executable, "-u", *self.script.target), "spawn"

    def logs(self, launch: Launch) -> "LogsSpecs":
        from ddp_lib.launch.rank_log import RankLogs

        name = f"{self.script.name.removesuffix('.py')}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        return RankLogs(Path(self.options.log_dir) / name, self.options.shown(), launch.local)

    def equal(self, elastic: bool) -> dict[str, Any]:
        return {"files": self.script.digests(), "flags": self.script.args}
