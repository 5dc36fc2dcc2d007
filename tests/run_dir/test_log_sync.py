"""The master's copy of another machine's log: by a thread while the ranks train, and whole after `send`."""

import time
from dataclasses import dataclass, replace

import pytest
import torch.distributed as dist

from ddp_lib.run_dir import log_sync
from ddp_lib.run_dir.log import RunLog
from ddp_lib.run_dir.log_sync import LogSync


@dataclass(frozen=True)
class TwoMachines:
    """A World without a process group."""

    store: dist.Store
    rank: int = 0

    @property
    def is_main(self):
        return self.rank == 0


@pytest.fixture
def machines(tmp_path):
    """The LogSync of the master and of another machine, as threads here, and its log on both."""
    world = TwoMachines(dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
    a, b = tmp_path / "a", tmp_path / "b"
    syncs = []

    def make(every_s):
        for rank, folder in enumerate((a, b)):
            folder.mkdir()
            syncs.append(LogSync(folder, replace(world, rank=rank), [0, 1], 1.0, every_s))
        return *syncs, a / "rank1.jsonl", b / "rank1.jsonl"

    yield make
    for sync in syncs:
        sync.close()
        assert not sync._thread.is_alive()


def write(original, lines):
    with RunLog(original.parent, 1) as log:
        for number in range(lines):
            log.write(number=number)


def send(master, other, monkeypatch):
    """The collective, on both."""
    pieces = []
    monkeypatch.setattr(log_sync, "gather_bytes", lambda world, piece: pieces.append(piece) or [])
    other.send()
    monkeypatch.setattr(log_sync, "gather_bytes", lambda world, piece: [piece, *pieces])
    master.send()


def test_lines_come_without_a_collective_and_once(machines, monkeypatch):
    monkeypatch.setattr(log_sync, "_PIECE", 100)  # so that pieces cut lines
    master, other, copy, original = machines(0.01)
    for _ in range(2):
        write(original, 20)
        deadline = time.monotonic() + 20
        while not copy.exists() or copy.read_bytes() != original.read_bytes():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        send(master, other, monkeypatch)
        assert copy.read_bytes() == original.read_bytes()


def test_the_collective_needs_no_thread(machines, monkeypatch):
    master, other, copy, original = machines(1000.0)
    for lines in (5, 0, 7):
        write(original, lines)
        send(master, other, monkeypatch)
        assert copy.read_bytes() == original.read_bytes()
