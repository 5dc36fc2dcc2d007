"""Agents that do not find each other."""

import socket

import pytest

from ddp_lib.launch.rendezvous import _sort_key
from tests.lab.processes import TRAIN, end, start_piped


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("endpoint", "named"),
    [("no-such-host.invalid:29500", "does not resolve"), ("{taken}", "another program")],
    ids=["no name", "another program's port"],
)
def test_an_endpoint_that_is_no_rendezvous_is_named(started, tmp_path, endpoint, named):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = endpoint.format(taken=f"127.0.0.1:{silent.getsockname()[1]}")
        process = start_piped(
            [*TRAIN, "--nnodes=2", "--rdzv-endpoint", endpoint, "--join-timeout-s", "1"], tmp_path
        )
        started.append(process)
        status, _, err = end(process)
    assert status == (75 if "resolve" in named else 2)  # a name may resolve later
    assert len(err) == 1 and err[0].startswith("ddp-launch: error: ")
    assert named in err[0] and endpoint.rpartition(":")[0] in err[0]
    assert list(tmp_path.iterdir()) == []


def test_machines_are_numbered_in_the_order_of_their_addresses():
    for first, second in (("10.0.0.9", "10.0.0.10"), ("10.0.0.10", "10.0.0.100"), ("fd77::9", "fd77::10")):
        assert _sort_key(first) < _sort_key(second)
    assert _sort_key("") == ""
