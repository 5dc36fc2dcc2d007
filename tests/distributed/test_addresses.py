"""What a machine finds out about addresses, with made-up ones; real ones are in tests/hosts."""

import pytest

from ddp_lib.distributed import addresses as network
from ddp_lib.distributed.addresses import (
    Endpoint,
    endpoint_addresses,
    is_guess,
    name_interface,
    own_address,
    require_interfaces,
)
from ddp_lib.errors import UserError

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
        (
            "me",
            False,
            ["10.0.0.5", "127.0.1.1"],
        ),  # Debian: several machines need the outside address
        ("me", True, ["127.0.1.1"]),
        ("localhost", False, ["127.0.0.1"]),  # a rehearsal on one computer
        ("127.0.0.1", False, ["127.0.0.1"]),
        ("nobody", False, []),
    ],
)
def test_what_a_host_means(host, one_machine, expected):
    assert endpoint_addresses(Endpoint(host, 1), one_machine) == expected


@pytest.mark.parametrize(
    ("host", "address", "interface"),
    [("far", "10.0.0.5", "eth0"), ("me", "10.0.0.5", "eth0"), ("localhost", "127.0.0.1", "lo")],
)
def test_the_interface_towards_the_master_is_chosen(host, address, interface):
    endpoint = Endpoint(host, 1)
    assert own_address(endpoint, False) == address
    variables = {"NCCL_SOCKET_IFNAME": "mine"}
    assert name_interface(endpoint, False, variables) == interface
    assert variables == {"NCCL_SOCKET_IFNAME": "mine", "GLOO_SOCKET_IFNAME": interface}


MORE = {**OWN, "172.17.0.1": "docker0", "fd00::5": "eth1", "10.9.0.5": "eth1"}


def test_the_users_interface_wins(monkeypatch):
    monkeypatch.setattr(network, "own_addresses", lambda: MORE)
    for name, address in (("eth1", "10.9.0.5"), ("docker0", "172.17.0.1"), ("eth1,eth0", "10.9.0.5")):
        assert own_address(Endpoint("far", 1), False, {"GLOO_SOCKET_IFNAME": name}) == address


def test_an_interface_that_is_not_there_is_named():
    require_interfaces({"GLOO_SOCKET_IFNAME": "lo"})
    with pytest.raises(
        UserError, match=r"GLOO_SOCKET_IFNAME='lo,eth99': .* has no interface 'eth99', but .*lo"
    ):
        require_interfaces({"GLOO_SOCKET_IFNAME": "lo,eth99"})


@pytest.mark.parametrize(
    ("own", "host", "guess"),
    [(OWN, "me", False), (MORE, "me", True), (MORE, "far", False), (MORE, "10.0.0.5", False)],
)
def test_with_several_interfaces_a_name_says_little(monkeypatch, own, host, guess):
    """Only the others know at which of its addresses they reach the machine."""
    monkeypatch.setattr(network, "own_addresses", lambda: own)
    assert is_guess(Endpoint(host, 1)) == guess
