"""Which networks NCCL is told of."""

import pytest

from ddp_lib.distributed import nics
from ddp_lib.distributed.addresses import CHOSE_NCCL
from ddp_lib.distributed.nics import leading, name_networks, other_networks
from ddp_lib.distributed.probe import Link

DOCKER, STORAGE = ("docker0", "172.17.0.1/16"), ("eth2", "10.3.0.1/24")
MINE = [("eth1", "10.1.0.1/24"), DOCKER, STORAGE, ("eth3", "fd01::1/64")]
SECOND = [("ens1", "10.1.0.2/24"), DOCKER, ("ens3", "fd01::2/64")]
THIRD = [("eth1", "10.1.0.3/24"), DOCKER]
# Each: the other machines' networks, addresses that cannot be reached, the interfaces that lead to all.
CLUSTERS = {
    "two machines": ([SECOND], [], ["eth1", "eth3"]),
    "three": ([SECOND, THIRD], [], ["eth1"]),
    "one has a single network": ([SECOND, []], [], []),
    "a firewall": ([SECOND], ["10.1.0.2"], ["eth3"]),
    "nobody else": ([], [], []),
}


@pytest.mark.parametrize(("others", "lost", "names"), CLUSTERS.values(), ids=CLUSTERS)
def test_an_interface_must_lead_to_all_machines(others, lost, names):
    assert leading(MINE, others, lost) == names


def entry(address: str, networks: list) -> dict:
    return {"probe": [address, 1], "nics": [(*network, 2) for network in networks]}


@pytest.mark.parametrize(
    ("variables", "after"),
    [
        ({"NCCL_SOCKET_IFNAME": "=eth0", CHOSE_NCCL: "eth0"}, "=eth0,eth1,eth3"),
        ({"NCCL_SOCKET_IFNAME": "=eth0"}, "=eth0"),  # the user's
        ({"NCCL_SOCKET_IFNAME": "eth", CHOSE_NCCL: "eth0"}, "eth"),
    ],
)
def test_the_users_choice_stands_else_all_are_named(monkeypatch, variables, after):
    monkeypatch.setattr(nics, "own_addresses", lambda: {"10.0.0.1": "eth0"})
    monkeypatch.setattr(nics, "other_networks", lambda address: MINE)
    name_networks([entry("10.0.0.1", MINE), entry("10.0.0.2", SECOND)], [], variables)
    assert variables["NCCL_SOCKET_IFNAME"] == after


def test_the_networks_of_this_machine_have_a_prefix():
    for name, network in other_networks("127.0.0.1"):
        address, _, prefix = network.partition("/")
        assert name != "lo" and address and 0 < int(prefix) <= 128


@pytest.mark.parametrize("reached", [True, False])
def test_only_the_next_machine_is_tried_on_shared_networks(monkeypatch, reached):
    tried = []

    def connect_all(addresses) -> list:
        tried.extend(addresses)
        return [Link("" if reached else "gets no answer") for _ in addresses]

    monkeypatch.setattr(nics, "own_addresses", lambda: {"10.0.0.1": "eth0"})
    monkeypatch.setattr(nics, "connect_all", connect_all)
    machines = [entry("10.0.0.1", MINE), entry("10.0.0.2", SECOND), entry("10.0.0.3", THIRD)]
    assert nics.unreachable(machines, 0) == ([] if reached else ["10.1.0.2"])
    assert tried == [("10.1.0.2", 2)]
