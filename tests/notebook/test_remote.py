"""Ranks of another machine join those of a notebook, if both sides know the token."""

import re
import socket
import subprocess
import sys
import threading

import pytest

from ddp_lib.distributed.addresses import Endpoint
from ddp_lib.errors import TransientError, UserError
from ddp_lib.notebook import remote
from ddp_lib.notebook.join import connect, join_notebook
from tests.lab.kernel import kernel
from tests.lab.ports import free_port
from tests.lab.processes import TIMEOUT_S, clean_environment


class Lines(list):
    """Stands for the screen; `first` waits for the line that is printed first."""

    def __init__(self) -> None:
        super().__init__()
        self._there = threading.Event()

    def __call__(self, line: str, **options: object) -> None:
        self.append(line)
        self._there.set()

    def token(self) -> str:
        assert self._there.wait(TIMEOUT_S)
        return self[0].split()[-1]


def test_only_who_knows_the_token_is_admitted_and_nothing_is_unpickled_before(monkeypatch):
    lines, admitted = Lines(), []
    monkeypatch.setattr(remote, "print", lines, raising=False)
    monkeypatch.setattr(remote, "_PROOF_S", 1)
    endpoint = Endpoint("127.0.0.1", free_port(), "--rdzv-endpoint")
    thread = threading.Thread(target=lambda: admitted.extend(remote.admit(endpoint, 1, TIMEOUT_S)))
    thread.start()
    token = lines.token()
    with socket.create_connection(("127.0.0.1", endpoint.port)) as other:  # sends what would be unpickled
        other.sendall(b"\x00\x00\x00\x20" + b"cos\nsystem\n(S'exit 1'\ntR.".ljust(32))
        while other.recv(1000):
            pass
    with pytest.raises(UserError, match="refuses this token: copy the line that %ranks has printed"):
        join_notebook(endpoint, token + "x", 1)
    client = connect(endpoint, token, TIMEOUT_S)
    client.send(("ranks", 3))
    thread.join(TIMEOUT_S)
    assert [machine.nproc for machine in admitted] == [3]
    refused = "refused 127.0.0.1: it does not know this notebook's token"
    assert lines[1:] == [refused, refused, "127.0.0.1 has joined with 3 rank(s)"]
    client.close()
    admitted[0].connection.close()
    with pytest.raises(TransientError, match="nobody listens on 127"):
        join_notebook(endpoint, token, 1)


def test_a_silent_address_is_named():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = Endpoint("127.0.0.1", silent.getsockname()[1], "HOST:PORT")
        with pytest.raises(TransientError, match=r"no notebook answers at 127.0.0.1:\d+ \(.+\): check the"):
            join_notebook(endpoint, "token", 1, timeout_s=0.2)


@pytest.mark.ranks
def test_cells_run_on_the_ranks_of_both_machines(tmp_path):
    """Both are this one, as in `run_nodes`."""
    others: list[subprocess.Popen[bytes]] = []

    def join(text: str) -> None:
        if line := re.search(r"ddp-launch (join .*)", text):
            command = [sys.executable, "-m", "ddp_lib.launch", *line[1].split(), "--nproc-per-node", "1"]
            others.append(subprocess.Popen(command, env=clean_environment(), cwd=tmp_path))

    cell = "import torch, torch.distributed as dist\nx = torch.ones(1)\ndist.all_reduce(x)\nint(x)"
    try:
        with kernel(tmp_path) as notebook:
            notebook.run("%load_ext ddp_lib")
            start = f"%ranks 1 --nnodes 2 --rdzv-endpoint 127.0.0.1:{free_port()}"
            assert notebook.run(start, on_text=join).text.endswith("ranks 0-1: ready\n")
            assert notebook.run(f"%%ranks\nprint('here', rank)\n{cell}").result == "[2, 2]"
            assert notebook.run("%%ranks\nprint('here', rank)").text == "[rank 0] here 0\n[rank 1] here 1\n"
            shown = notebook.run("%%ranks --timeout-s 1\nif rank == 0:\n    dist.barrier()")
            assert shown.error.endswith("ranks 0-1: new; names that are gone: dist, torch, x")
            assert notebook.run(f"%%ranks\n{cell}").result == "[2, 2]"
            assert "ValueError: there" in notebook.run("%%ranks 1\nraise ValueError('there')").error
            others[0].kill()
            others[0].wait(TIMEOUT_S)
            shown = notebook.run("%%ranks\nx")
            assert "rank 1: its machine is gone" in shown.error and "rank 0: new (without 127" in shown.error
            assert notebook.run("%%ranks\nworld_size").result == "[1]"
    finally:
        for process in others:
            process.kill()
            process.wait(TIMEOUT_S)
