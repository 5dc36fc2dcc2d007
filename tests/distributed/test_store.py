"""The store at the master: what is said if the ranks do not come together."""

import socket
import subprocess
import sys
import threading
import time

import pytest

from ddp_lib.distributed.addresses import Endpoint, wait_until_true
from ddp_lib.distributed.store import reach_store
from ddp_lib.errors import UserError
from tests.lab.joining import TIMEOUT_S, four, outcome, start
from tests.lab.ports import free_port


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"MASTER_ADDR": "no-such-host.invalid"},
            "MASTER_ADDR='no-such-host.invalid' does not resolve",
        ),
        ({}, "nobody listens on MASTER_ADDR=127.0.0.1"),
    ],
)
def test_a_missing_master_is_named(changes, says):
    code, text = outcome(start(1, **(four(1, free_port()) | changes)))
    assert code == 2
    assert says in text and "--join-timeout-s" in text and text.count("\n") == 1


@pytest.mark.ranks
def test_a_missing_rank_is_named():
    port = free_port()
    present = [start(8, **four(rank, port, 3)) for rank in (0, 2)]
    for process in present:
        code, text = outcome(process)
        assert code == 2 and "rank(s) 1 of 3" in text


@pytest.mark.ranks
def test_a_second_master_is_refused():
    """The second comes while the first waits for rank 1, and finds the port taken."""
    port = free_port()
    first = start(TIMEOUT_S, **four(0, port))
    try:
        assert wait_until_true(lambda: listens(port), time.monotonic() + TIMEOUT_S)
        code, text = outcome(start(**four(0, port)))
        assert code == 2 and f"MASTER_PORT={port} cannot be opened" in text
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.ranks
def test_two_ranks_with_one_number_are_refused():
    """All end, for a third is missing; and the second, at least, finds its number taken."""
    port = free_port()
    started = [start(TIMEOUT_S, **four(rank, port, 3)) for rank in (0, 1, 1)]
    codes, texts = zip(*map(outcome, started), strict=True)
    assert codes == (2, 2, 2)
    assert any("RANK=1 is taken" in text for text in texts[1:])


STAYS = """
import sys
from ddp_lib import World
with World.join(join_timeout_s=float(sys.argv[1])) as world:
    print("joined", flush=True)
    sys.stdin.read()
"""


@pytest.mark.ranks
def test_who_comes_to_a_job_that_has_started_is_refused_and_the_job_goes_on():
    port = free_port()
    job = [start(TIMEOUT_S, STAYS, **four(rank, port)) for rank in (0, 1)]
    try:
        for process in job:
            while "joined" not in process.stdout.readline():
                assert process.poll() is None
        code, text = outcome(start(TIMEOUT_S, **four(1, port)))
        assert code == 2 and "belongs to a job of 2 rank(s), of which" in text and "has started" in text
        assert [outcome(process)[0] for process in job] == [0, 0]
    finally:
        for process in job:
            process.kill()


@pytest.mark.ranks
def test_different_world_sizes_are_named():
    port = free_port()
    started = [start(8, **four(rank, port, size)) for rank, size in ((0, 3), (1, 2))]
    for process in started:
        code, text = outcome(process)
        assert code == 2 and "WORLD_SIZE=" in text and "on every machine" in text


@pytest.mark.ranks
def test_another_program_on_the_port_is_named():
    """It sends garbage to whoever connects."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(TIMEOUT_S)

        def serve() -> None:
            try:
                while True:
                    peer, _ = server.accept()
                    with peer:
                        peer.sendall(b"SSH-2.0-garbage\r\n")
            except OSError:
                return

        threading.Thread(target=serve, daemon=True).start()
        port = server.getsockname()[1]
        code, text = outcome(start(3, **four(1, port)))
        assert code == 2 and f"MASTER_PORT={port}" in text and text.count("\n") == 1
        code, text = outcome(start(3, **four(0, port)))
        assert code == 2 and f"MASTER_PORT={port} cannot be opened" in text


@pytest.mark.ranks
def test_a_silent_program_on_the_port_is_named():
    """It accepts every connection and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code, text = outcome(start(2, **four(1, port)))
        assert code == 2 and f"MASTER_PORT={port}" in text and text.count("\n") == 1


def test_nothing_of_a_failed_attempt_goes_on():
    """The thread in which torch waits for a word would abort a process that ends."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match="silent"):
            reach_store(Endpoint("127.0.0.1", port), 1, True)
        assert all(thread.name != "store" for thread in threading.enumerate())


LOOK = """
import socket, threading, time
import torch.distributed as dist
from ddp_lib.distributed.addresses import Endpoint
from ddp_lib.distributed.store import _look_for_other_rank0

server = socket.create_server(("127.0.0.1", 0))
endpoint = Endpoint("127.0.0.1", server.getsockname()[1])
look = (endpoint, "job", dist.HashStore(), "me", time.monotonic() + 600)
threading.Thread(target=_look_for_other_rank0, args=look).start()
for _ in range(2):  # the first asks whether anybody listens, the second is torch's
    server.accept()
"""


@pytest.mark.ranks
def test_the_search_for_another_rank_0_ends_with_the_process():
    """Also if the program at MASTER_ADDR never says a word."""
    subprocess.run([sys.executable, "-c", LOOK], timeout=TIMEOUT_S, check=True)


@pytest.mark.ranks
def test_garbage_sent_to_the_master_does_not_stop_it():
    port = free_port()
    master = start(30, **four(0, port))
    sent = False
    while not sent:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as stray:
                stray.sendall(b"GET / HTTP/1.1\r\n\r\n" * 50)
            sent = True
        except ConnectionRefusedError:
            assert master.poll() is None
    assert outcome(start(30, **four(1, port)))[0] == 0
    assert outcome(master)[0] == 0
