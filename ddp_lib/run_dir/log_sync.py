"""The logs of all ranks in the master's folder, also if the machines share no disk.

Each rank writes its own log on its own machine. Logs only grow, so a copy is always the beginning of its
original, and the longer of two copies is newer.
"""

import struct
import threading
from contextlib import suppress
from pathlib import Path

from ddp_lib.distributed.collectives import broadcast_bytes, gather_bytes
from ddp_lib.distributed.world import World
from ddp_lib.run_dir.checkpoint_file import write_atomic
from ddp_lib.run_dir.log import LogSize, log_path, name_disk_errors

# In front of a piece of a log: where it begins.
_BEGIN = struct.Struct("<q")
_PIECE = 2**18  # bytes in the store at once, of each rank
_CLOSE_S = 2.0  # for a thread that is talking to the store


def copy_newest_logs(folder: Path, world: World, writers: list[int], sizes: list[list[LogSize]]) -> None:
    """Copies each log to the master and to the machine that continues it, before logs are opened.

    writers: each rank's writer. sizes: `log_sizes` of each writer's folder, [] for other ranks. All ranks
    call it with the same lists. Needed since ranks may have changed machines since the last start, and a
    killed job did not send its last lines.
    """
    held = [{rank: (starts, size) for rank, starts, size in logs} for logs in sizes]
    for log in sorted(set().union(*held)):
        best = max(range(len(held)), key=lambda rank: held[rank].get(log, (0, 0)))
        need = {writers[0], *writers[log : log + 1]}
        need = {rank for rank in need if held[rank].get(log) != held[best][log]}
        if need:
            path = log_path(folder, log)
            payload = broadcast_bytes(world, path.read_bytes() if world.rank == best else b"", best)
            if world.rank in need:
                write_atomic(path, payload)


class LogSync:
    """Sends new lines of this rank's log to the master; created after `copy_newest_logs`.

    Two ways that know nothing of each other: a thread, every `every_s` seconds, through the store and without
    a collective, so that the run can be watched; and `send`, a collective, after which the copies are whole.
    A piece says where it begins, and the master takes of it what it does not have.
    """

    def __init__(self, folder: Path, world: World, writers: list[int], began: float, every_s: float) -> None:
        self.folder, self.world, self.every_s = folder, world, every_s
        self._key = f"log/{began}"  # not of another run of the same ranks
        self.far = [rank for rank, writer in enumerate(writers) if writer != writers[0]]
        path = log_path(folder, world.rank)
        self.sent = path.stat().st_size if path.exists() else 0
        self._posted, self._lock, self._closed = self.sent, threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._sync, name="log sync", daemon=True)
        if world.is_main or world.rank in self.far:
            self._thread.start()

    def send(self) -> None:
        """All ranks call it. UserError if the master's disk refuses."""
        begin, new = self.sent, b""
        if self.world.rank in self.far:
            new = self._read(begin)
            self.sent += len(new)
        for rank, piece in enumerate(gather_bytes(self.world, _BEGIN.pack(begin) + new)):
            if rank in self.far:
                path = log_path(self.folder, rank)
                with name_disk_errors(path, "the log is whole on its own machine"):
                    self._append(rank, piece)

    def close(self) -> None:
        """Ends the thread; it is not waited for if the master no longer answers it."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(_CLOSE_S)

    def _sync(self) -> None:
        """In a thread: rank 0 takes what the others have posted. A disk or master that fails is noticed by
        `send`, and by the training itself."""
        with suppress(OSError, RuntimeError):
            # A connection of its own: the rank's may be waiting in another call.
            store = self.world.store.clone()
            # Rank 0 looks more often, so that a line is little later than `every_s`; less so at many ranks.
            look_s = max(0.5, len(self.far) / 100) if self.world.is_main else self.every_s
            while not self._closed.wait(min(look_s, self.every_s)):
                if self.world.is_main:
                    for rank in self.far:
                        if store.check([key := f"{self._key}/{rank}"]):
                            self._append(rank, store.get(key))
                            store.delete_key(key)
                elif not store.check([key := f"{self._key}/{self.world.rank}"]):
                    # The piece before this one has been taken.
                    new = self._read(self._posted, _PIECE)
                    store.set(key, _BEGIN.pack(self._posted) + new)  # type: ignore[arg-type]  # takes bytes
                    self._posted += len(new)

    def _read(self, begin: int, size: int = -1) -> bytes:
        """This rank's log from `begin` on, at most `size` bytes of it."""
        with suppress(FileNotFoundError), open(log_path(self.folder, self.world.rank), "rb") as file:
            file.seek(begin)
            return file.read(size)
        return b""

    def _append(self, rank: int, piece: bytes) -> None:
        """Writes what the master does not have of a piece."""
        (begin,), lines = _BEGIN.unpack_from(piece), piece[_BEGIN.size :]
        if lines:
            with self._lock, open(log_path(self.folder, rank), "ab") as file:
                file.write(lines[max(0, file.tell() - begin) :])
