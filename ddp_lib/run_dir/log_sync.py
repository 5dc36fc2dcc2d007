"""The logs of all ranks in the master's folder, also if the machines share no disk.

Each rank writes its own log on its own machine. Logs only grow, so a copy is always the beginning of its
original, and the longer of two copies is newer.
"""

from pathlib import Path

from ddp_lib.distributed.collectives import broadcast_bytes, gather_bytes
from ddp_lib.distributed.world import World
from ddp_lib.run_dir.checkpoint_file import write_atomic
from ddp_lib.run_dir.log import LogSize, log_path, name_disk_errors


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
    """Sends new lines of this rank's log to the master; created after `copy_newest_logs`."""

    def __init__(self, folder: Path, world: World, writers: list[int]) -> None:
        self.folder, self.world = folder, world
        self.is_far = writers[world.rank] != writers[0]
        path = log_path(folder, world.rank)
        self.sent = path.stat().st_size if path.exists() else 0

    def send(self) -> None:
        """All ranks call it. UserError if the master's disk refuses."""
        new = b""
        own = log_path(self.folder, self.world.rank)
        if self.is_far and own.exists():
            with open(own, "rb") as file:
                file.seek(self.sent)
                new = file.read()
            self.sent += len(new)
        for rank, piece in enumerate(gather_bytes(self.world, new)):
            if piece:
                path = log_path(self.folder, rank)
                with name_disk_errors(path, "the log is whole on its own machine"), open(path, "ab") as file:
                    file.write(piece)
