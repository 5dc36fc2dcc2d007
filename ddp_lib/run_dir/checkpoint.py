"""Checkpoint: the state of a run, saved and loaded by all ranks together, on any number of machines.

Machines that share no disk each keep a copy. All resume from the newest undamaged checkpoint on any machine,
since rank 0 may have moved; the rank that has it sends it to all.
"""

import json
import os
import socket
import time
import zipfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

from ddp_lib.distributed.collectives import broadcast_bytes
from ddp_lib.distributed.coordination import all_gather_results, broadcast_result, compare
from ddp_lib.distributed.world import World
from ddp_lib.errors import UserError, first_line
from ddp_lib.processes.signals import STARTS
from ddp_lib.run_dir import checkpoint_file
from ddp_lib.run_dir.checkpoint_file import RUN, Meta
from ddp_lib.run_dir.lock import lock_run_dir
from ddp_lib.run_dir.log import CONFIG, SUMMARY, LogSize, log_sizes
from ddp_lib.run_dir.log_sync import LogSync, copy_newest_logs

WEIGHTS = "cifar_net.pth"


@dataclass(frozen=True)
class Copy:
    """What a machine's copy of the folder holds, sent by its writer; other ranks send an empty Copy."""

    host: str = ""
    began: float = 0.0  # when the run first started, Unix time (0: not known)
    step: int = -1  # of the newest undamaged checkpoint (-1: none)
    saved_for: str = ""  # the digest of the data that this checkpoint was trained on
    damage: str = ""  # what is wrong with a checkpoint
    logs: list[LogSize] = field(default_factory=list)
    summary: dict[str, Any] | None = None  # of a finished run

    def is_older_than(self, began: float) -> bool:
        """Whether this is left over from a run earlier than the run that began at `began`."""
        return self.began < began and (self.step >= 0 or bool(self.logs))


def _earlier_starts() -> int:
    """How many times this job's launcher, or torchrun, has started this rank before."""
    return max(int(os.environ.get(name, "0")) for name in (STARTS, "TORCHELASTIC_RESTART_COUNT"))


class Checkpoint:
    """The newest state of a run, in `folder` on every machine.

    with Checkpoint("runs/mine", world) as checkpoint:
        state = checkpoint.load()                  # None at the first start
        ...
        checkpoint.save({"model": model.state_dict(), "epoch": epoch})

    A state is a dictionary of tensors and plain values. Every rank must call load and save; one rank per disk
    writes. A kill at any time leaves a whole checkpoint, new or old, once one has been saved, and the one
    before it is kept. `torch.load(folder / "checkpoint.pt")` gives the state too. The folder belongs to one
    job until the block ends.

    data_digest: of the data that is trained on; a checkpoint of other data is refused. resume: "auto" loads a
    checkpoint if there is one; "never" moves an earlier run to `folder`/earlier-1 (it resumes if the launcher
    has started the ranks again); "must" refuses a folder without one. timeout_s: how long ranks wait for
    each other's disks. log_sync_s: how often the master's folder gets the other machines' new log lines, if
    they share no disk.

    UserError, on every rank, if another job has the folder, it cannot be written, all checkpoints are
    damaged, or resume or data_digest do not allow what is found.
    """

    def __init__(
        self,
        folder: str | Path,
        world: World,
        data_digest: str = "",
        *,
        resume: Literal["auto", "never", "must"] = "auto",
        timeout_s: float = 600.0,
        log_sync_s: float = 5.0,
    ) -> None:
        self.folder, self.world, self.data_digest = Path(folder), world, data_digest
        self.resume, self.timeout_s, self.log_sync_s = resume, timeout_s, log_sync_s
        self.began = 0.0  # when the run first started (Unix time): its identity
        self.step = -1  # of the last save or load
        self._stack = ExitStack()
        self._payload = b""
        self.log_sync: LogSync | None = None
        self._entered = self._loaded = self._is_readable = False

    def __enter__(self) -> "Checkpoint":
        equal = {"the data's digest": self.data_digest[:16], "resume": self.resume}
        cure = "give every machine the same data and flags"
        compare(self.world, "checkpoint", equal, cure, self.timeout_s)
        if self.resume == "never" and any(
            all_gather_results(self.world, "starts", _earlier_starts, self.timeout_s)
        ):
            self.resume = "auto"
        with ExitStack() as stack:
            self._writers = lock_run_dir(self.folder, self.world, stack, self.timeout_s)
            self.is_writer = self._writers[self.world.rank] == self.world.rank
            copies = [
                Copy(**copy)
                for copy in all_gather_results(self.world, "inspect", self._inspect, self.timeout_s)
            ]
            self.began = max(copy.began for copy in copies)
            if copies[self.world.rank].is_older_than(self.began):
                self._move_aside("of an earlier run than another machine's")
            self.copies = [Copy(copy.host) if copy.is_older_than(self.began) else copy for copy in copies]
            self._source = self._newest()
            if self._source is not None:
                self.step = self.copies[self._source].step
            self._stack = stack.pop_all()
        self._entered = True
        return self

    def __exit__(self, *error: object) -> None:
        if self.log_sync is not None:
            self.log_sync.close()
        self._stack.close()

    def load(self, accept: Callable[[dict[str, Any]], None] = lambda state: None) -> dict[str, Any] | None:
        """The newest state, with tensors on the CPU, the same on every rank; None if the run starts afresh.

        accept: called with the state before anything in the folder changes; may raise a UserError.
        """
        if not self._entered or self._loaded:
            raise UserError("use it as `with Checkpoint(...) as checkpoint:`, and call load() once inside")
        state = None
        if self._source is not None:
            if self.copies[self.world.rank].damage:
                self.world.say(
                    f"warning: no whole checkpoint in {self.folder}: taking another machine's", True
                )
            self._payload = broadcast_bytes(self.world, self._payload, self._source)
            state = checkpoint_file.from_bytes(self._payload)
            accept(state)
        self.began = self.began or broadcast_result(self.world, "began", time.time, self.timeout_s)
        if len(set(self._writers)) > 1:  # the machines do not all share the disk
            copy_newest_logs(self.folder, self.world, self._writers, [copy.logs for copy in self.copies])
            self.log_sync = LogSync(self.folder, self.world, self._writers, self.began, self.log_sync_s)
        self._loaded = True
        all_gather_results(self.world, "write", self._write_copy, self.timeout_s)
        self._payload = b""
        return state

    def save(self, state: dict[str, Any] | Callable[[], dict[str, Any]], step: int | None = None) -> bool:
        """Writes `state`, if this is the rank that writes to its disk; returns whether it is.

        state: a function that makes it is called only where it is written. step: orders the checkpoints of a
        run; counted if not given.
        """
        if not self._loaded:
            raise UserError(
                "Checkpoint.save before Checkpoint.load: call load() first, also at the first start"
            )
        self.step = self.step + 1 if step is None else step
        if self.is_writer:
            meta = Meta(self.began, self.step, self.data_digest)
            sealed = checkpoint_file.seal(state() if callable(state) else state, meta)
            self._require_readable(sealed)
            checkpoint_file.save(self.folder, sealed)
        return self.is_writer

    def _require_readable(self, sealed: bytes) -> None:
        """At the first save: torch.save takes any object, but torch.load(weights_only=True) does not."""
        if self._is_readable:
            return
        try:
            checkpoint_file.from_bytes(sealed)
        except UnpicklingError as error:
            raise UserError(
                f"the state holds what is neither a tensor nor a plain value ({first_line(error)}): save "
                "numbers, strings, lists, dictionaries and tensors"
            ) from None
        self._is_readable = True

    def sync_logs(self) -> None:
        """Brings the master's copies of all ranks' logs up to date; all ranks call it."""
        if self.log_sync is not None:
            self.log_sync.send()

    def resumed_from(self) -> str:
        """For a message: the machine whose checkpoint was loaded, if that is not the master."""
        return f", the checkpoint of {self.copies[self._source].host}" if self._source else ""

    def _write_copy(self) -> None:
        """Gives this machine the run's beginning, and its newest checkpoint if another machine had it."""
        if not self.is_writer:
            return
        text = f"{json.dumps({'began': self.began})}\n"
        checkpoint_file.write_atomic(self.folder / RUN, text.encode())
        if self._source is not None and self.copies[self.world.rank].step < self.step:
            checkpoint_file.save(self.folder, self._payload)

    def _inspect(self) -> dict[str, Any]:
        """What this machine's copy of the folder holds; keeps the bytes of its newest checkpoint."""
        if not self.is_writer:
            return asdict(Copy())
        for half_written in self.folder.glob(".*.tmp"):  # by processes that were killed
            half_written.unlink(missing_ok=True)
        host = socket.gethostname()
        if self.resume == "never":
            self._move_aside("--resume never")
            return asdict(Copy(host))
        meta, damage, summary = Meta(0.0, -1), "", None
        for name in (CONFIG, RUN):
            with suppress(OSError, ValueError, KeyError, TypeError):
                meta = Meta(float(json.loads((self.folder / name).read_text())["began"]), -1)
        try:
            if found := checkpoint_file.find(self.folder, lambda line: self.world.say(line, True)):
                began = meta.began
                self._payload, meta = found
                meta = meta if meta.began else Meta(began, meta.step)
        except UserError as error:
            damage = str(error)  # not raised yet: another machine may have an undamaged checkpoint
        # Damaged results are made again from the checkpoint; a damaged zip fails in many ways.
        with suppress(Exception), zipfile.ZipFile(self.folder / WEIGHTS) as model:
            if model.testzip() is None:
                summary = json.loads((self.folder / SUMMARY).read_text())
        logs = log_sizes(self.folder)
        return asdict(Copy(host, meta.began, meta.step, meta.data_digest, damage, logs, summary))

    def _newest(self) -> int | None:
        """The rank with the newest checkpoint, the lowest such rank; None: a fresh start."""
        rank = max(range(len(self.copies)), key=lambda rank: self.copies[rank].step)
        if self.copies[rank].step >= 0:
            before, now = self.copies[rank].saved_for, self.data_digest
            if before and now and before != now:
                raise UserError(
                    f"{self.folder} holds a run on other data (its digest is {before[:16]}, now {now[:16]}): "
                    "give the same data, name another --run-dir, or --resume never to start again"
                )
            return rank
        for copy in self.copies:
            if copy.damage:
                raise UserError(copy.damage)
        if self.resume == "must":
            raise UserError(
                f"--resume must: {self.folder} holds no checkpoint; check --run-dir, or use --resume auto"
            )
        return None

    def _move_aside(self, why: str) -> None:
        if target := checkpoint_file.move_aside(self.folder):
            self.world.say(f"{why}: what {self.folder} held is now in {target}", every_node=True)
