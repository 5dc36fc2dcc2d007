"""Reaching the machine where all meet, or being it."""

import socket
import time

from ddp_lib.errors import UserError
from ddp_lib.network import (
    Endpoint,
    first_hit,
    is_loopback,
    meanings,
    own_addresses,
    resolve,
)

# Between two attempts to reach a master that is not there yet.
_RETRY_S = 0.2


def wait_for_name(endpoint: Endpoint, join_timeout_s: float) -> None:
    """Returns when the endpoint's host resolves; UserError after `join_timeout_s`."""
    deadline = time.monotonic() + join_timeout_s - _RETRY_S
    if not first_hit(lambda: bool(resolve(endpoint.host, endpoint.port)), deadline, _RETRY_S):
        raise UserError(
            f"{endpoint.host_name} does not resolve: check the name, or give an address "
            f"(tried for {round(join_timeout_s, 1):g} s; --join-timeout-s sets it)"
        )


def wait_for_master(
    endpoint: Endpoint,
    join_timeout_s: float,
    one_machine: bool = True,
    silence_s: float | None = None,
) -> str:
    """The address at which the master listens, as soon as it does.

    A name that does not resolve yet (compose, Kubernetes) and a master that is not started yet are
    tried again until `join_timeout_s` is over; then a UserError says how far it got. silence_s: how
    long to bear it that packets vanish, where the master's machine is known to be up.
    """
    began = time.monotonic()
    wait_for_name(endpoint, join_timeout_s)
    while True:
        limit_s = join_timeout_s
        trouble = f"{endpoint.host_name} does not resolve any more: check the name"
        for address in meanings(endpoint, one_machine):
            try:
                left = began + join_timeout_s - time.monotonic()
                socket.create_connection(
                    (address, endpoint.port), timeout=max(0.1, min(5.0, left))
                ).close()
                return address
            except ConnectionRefusedError:
                trouble = (
                    f"nobody listens on {endpoint}: "
                    "start rank 0 there, and check that both name its machine"
                )
            except OSError as error:
                trouble = (
                    f"no answer from {endpoint} ({error.strerror or error}): "
                    "check the address, and that no firewall closes the port"
                )
                limit_s = join_timeout_s if silence_s is None else min(silence_s, join_timeout_s)
        if time.monotonic() + _RETRY_S > began + limit_s:
            names = meanings(endpoint, one_machine)
            if names and is_loopback(names[-1]) and not is_loopback(endpoint.host):
                trouble += (
                    f"; on {socket.gethostname()} the name means this machine itself (/etc/hosts)"
                )
            raise UserError(
                f"{trouble} (tried for {round(limit_s, 1):g} s; --join-timeout-s sets it)"
            )
        time.sleep(_RETRY_S)


def listen(
    endpoint: Endpoint, join_timeout_s: float, one_machine: bool
) -> tuple[socket.socket, str]:
    """A listening socket for the store, and the address at which this process reaches it.

    It listens on the address that the others use and on no other: the store has no password. Where
    the endpoint is no address of this machine (a published container port), or a name that means
    loopback here on a machine with several outward addresses, it has to listen on all.
    """
    wait_for_name(endpoint, join_timeout_s)
    mine = own_addresses()
    found = meanings(endpoint, one_machine)
    usable = [a for a in found if a in mine or is_loopback(a)]
    outward = [a for a in usable if not is_loopback(a)]
    guessed = found != resolve(endpoint.host, endpoint.port)
    everywhere = not usable or (guessed and len(outward) != 1)
    ipv6 = ":" in (usable or found)[0]
    address = ("::" if ipv6 else "0.0.0.0") if everywhere else usable[0]
    server = socket.socket(socket.AF_INET6 if ipv6 else socket.AF_INET, socket.SOCK_STREAM)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if ipv6 and everywhere:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        server.bind((address, endpoint.port))
        server.listen(1024)
    except OSError as error:
        server.close()
        raise PortTaken(
            f"{endpoint.port_name} cannot be opened on {endpoint.host} ({error.strerror}): "
            "end the program that has it, or choose another port on every machine"
        ) from None
    return server, ("::1" if ipv6 else "127.0.0.1") if everywhere else address


class PortTaken(UserError):
    """Another program has the port; perhaps another process of this job."""
