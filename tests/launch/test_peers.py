"""What launchers tell each other over the store, without any processes of a job."""

import json
import os
import subprocess
import sys
import threading

import pytest
import torch.distributed as dist

from ddp_lib.distributed.addresses import Endpoint
from ddp_lib.errors import UserError
from ddp_lib.launch.options import Launch
from ddp_lib.launch.peers import Peers
from ddp_lib.processes.identity import identify

LAUNCH = Launch("1", (2, 2), Endpoint("10.0.0.1", 29500, "--rdzv-endpoint"), None, "mine", 0)


@pytest.fixture
def store():
    return dist.HashStore()


def test_one_that_is_just_starting_keeps_its_place(store):
    """It has given no sign of life yet."""
    Peers(store, LAUNCH, "10.0.0.1", True).announce()
    second = Peers(store, LAUNCH, "10.0.0.1", False)
    with pytest.raises(UserError, match=rf"is in the job 'mine' already \(by process {os.getpid()}, since"):
        second.announce()
    assert len(second.arrived()) == 1


@pytest.mark.process
def test_one_that_has_ended_leaves_its_place_to_the_next(store, monkeypatch):
    ended = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    with ended, monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: ended.pid)
        Peers(store, LAUNCH, "10.0.0.1", True).announce()
    assert identify(ended.pid) == []
    again = Peers(store, LAUNCH, "10.0.0.1", False)
    again.announce()
    assert len(again.arrived()) == 1
    assert again.store.check(["agent/1"]) and not again.store.check(["agent/2"])


def test_the_stores_host_waits_until_all_others_have_read_the_end(store):
    host, *others = (Peers(store, LAUNCH, f"10.0.0.{n}", n == 1) for n in (1, 2, 3))
    for launcher in (host, *others):
        store.set(f"agent/{store.add('agents', 1)}", json.dumps({"id": launcher._id}))
    others[0].publish_end("a rank failed", 1)
    assert host.read_end() == host.read_end() == ("a rank failed", 75)
    waiting = threading.Thread(target=host.wait_until_read, args=(60.0,))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    others[1].read_end()
    waiting.join(30)
    assert not waiting.is_alive()
