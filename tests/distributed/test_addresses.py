"""What a machine finds out about addresses, with made-up ones; real ones are in tests/hosts."""

import pytest

from ddp_lib.distributed import addresses as network
from ddp_lib.distributed.addresses import Endpoint, meanings, name_interface, own_address
from ddp_lib.distributed.probe import Probe, bandwidth, connect, connect_all
from ddp_lib.errors import UserError
from ddp_lib.launch.diagnosis import causes, table
from ddp_lib.launch.options import CheckOptions, LaunchOptions, read_launch

OWN = {"127.0.0.1": "lo", "::1": "lo", "10.0.0.5": "eth0", "fe80::5": "eth0"}
NAMES = {
    "me": ["127.0.1.1"],
    "far": ["10.0.0.9"],
    "localhost": ["127.0.0.1"],
    "127.0.0.1": ["127.0.0.1"],
}


@pytest.fixture(autouse=True)
def _made_up(monkeypatch):
    def towards(address: str, port: int) -> str:
        if ":" in address:
            raise OSError
        return "10.0.0.5"

    monkeypatch.setattr(network, "own_addresses", lambda: OWN)
    monkeypatch.setattr(network, "resolve", lambda host, port: NAMES.get(host, []))
    monkeypatch.setattr(network, "own_address_towards", towards)


@pytest.mark.parametrize(
    ("host", "one_machine", "expected"),
    [
        ("far", False, ["10.0.0.9"]),
        ("me", False, ["10.0.0.5", "127.0.1.1"]),  # Debian: several machines meet outside
        ("me", True, ["127.0.1.1"]),
        ("localhost", False, ["127.0.0.1"]),  # a rehearsal on one computer
        ("127.0.0.1", False, ["127.0.0.1"]),
        ("nobody", False, []),
    ],
)
def test_what_a_host_means(host, one_machine, expected):
    assert meanings(Endpoint(host, 1), one_machine) == expected


@pytest.mark.parametrize(
    ("host", "address", "interface"),
    [("far", "10.0.0.5", "eth0"), ("me", "10.0.0.5", "eth0"), ("localhost", "127.0.0.1", "lo")],
)
def test_own_address_and_interface(host, address, interface):
    endpoint = Endpoint(host, 1)
    assert own_address(endpoint, False) == address
    found = {"NCCL_SOCKET_IFNAME": "mine"}
    assert name_interface(endpoint, False, found) == interface
    assert found == {"NCCL_SOCKET_IFNAME": "mine", "GLOO_SOCKET_IFNAME": interface}


def test_pet_variables_stand_behind_flags():
    pet = {"PET_NNODES": "2:4", "PET_RDZV_ENDPOINT": "[fd77::1]:7", "PET_NPROC_PER_NODE": "gpu"}
    launch = read_launch(LaunchOptions(), pet)
    assert (launch.nodes, launch.nproc, str(launch.endpoint)) == (
        (2, 4), "gpu", "PET_RDZV_ENDPOINT [fd77::1]:7",
    )  # fmt: skip
    assert read_launch(LaunchOptions(nnodes="3"), pet).nodes == (3, 3)
    # Kubeflow sets a master also where there is one machine.
    assert (
        read_launch(LaunchOptions(), {"PET_MASTER_ADDR": "m", "PET_NNODES": "1"}).endpoint is None
    )
    with pytest.raises(UserError, match=r"^PET_NNODES 'two'"):
        read_launch(LaunchOptions(), {"PET_NNODES": "two"})
    with pytest.raises(UserError, match=r"^PET_NODE_RANK is 4"):
        read_launch(LaunchOptions(), {**pet, "PET_NODE_RANK": "4"})


def test_a_probe_answers_and_is_gone():
    with Probe("127.0.0.1") as probe:
        link = connect("127.0.0.1", probe.port, pings=3)
        assert (link.trouble, link.seen_as) == ("", "127.0.0.1")
        assert 0 < link.latency_s < 4 and abs(link.clock_s) < 4
        assert bandwidth("127.0.0.1", probe.port, 0.01, 20) > 0
        both = connect_all([("127.0.0.1", probe.port)] * 2)
        assert [one.trouble for one in both] == ["", ""]
        port = probe.port
    assert connect("127.0.0.1", port).trouble == "is refused"


def test_a_healthy_pair_has_no_causes():
    def card(number: int, **changes) -> dict:
        return {
            "host": f"m{number}", "address": f"10.0.0.{number}", "interface": "eth0", "size": 2,
            "rank": number, "size_name": "WORLD_SIZE", "rank_name": "RANK", "torch": "2", "hosts": True,
            "ddp_lib": "1", "gpus": 0, "ranks": 1, "backend": "auto", "free": 2**40, "data": "",
            "troubles": [], "probe": [f"10.0.0.{number}", 1], **changes,
        }  # fmt: skip

    def row(number: int) -> dict:
        link = {"trouble": "", "seen_as": f"10.0.0.{number}", "latency_s": 1e-3, "clock_s": 0.0}
        return {"links": [link, link], "rate": 1e9}

    rows = [row(0), row(1)]
    assert causes([card(0), card(1)], rows, 15) == []
    assert len(table([card(0), card(1)], rows).splitlines()) == 3
    (line,) = causes([card(0), card(1, free=5)], rows, 15)
    assert "m1 (10.0.0.1) has 0.00 GB free" in line
    (line,) = causes([card(0, data="a"), card(1, data="b")], rows, 15)
    assert "data is b on m1" in line
    (line,) = causes([card(0), card(1)], [row(0), None], 15)
    assert "m1 (10.0.0.1) came, but did not finish" in line
    assert CheckOptions().timeout_s == 30
