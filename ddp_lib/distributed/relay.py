"""The store at a second address: a name may mean IPv4 on one machine, and IPv6 on another."""

import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from ddp_lib.distributed.addresses import own_addresses

if TYPE_CHECKING:
    from asyncio import StreamReader, StreamWriter

_CHUNK = 1 << 16


def relay_other_family(address: str, port: int) -> None:
    """Passes on what comes to `port` at the addresses of the other IP version that `address`'s interface has,
    as long as this process lives. PyTorch's store listens at a single address, or at all of the machine's."""
    mine = own_addresses()
    listeners = []
    for other, interface in mine.items():
        here = interface == mine.get(address) and not other.startswith("fe80:")
        if here and (":" in other) != (":" in address):
            family = socket.AF_INET6 if ":" in other else socket.AF_INET
            with suppress(OSError):  # taken by another program, which a client will name
                listeners.append(socket.create_server((other, port), family=family, backlog=1024))
    if listeners:
        threading.Thread(target=_run, args=(listeners, address, port), name="relay", daemon=True).start()


def _run(listeners: list[socket.socket], address: str, port: int) -> None:
    import asyncio  # takes time to import, and is seldom needed

    async def copy(reader: "StreamReader", writer: "StreamWriter") -> None:
        with suppress(OSError):
            while data := await reader.read(_CHUNK):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def connect(reader: "StreamReader", writer: "StreamWriter") -> None:
        try:
            store_reader, store_writer = await asyncio.open_connection(address, port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(copy(reader, store_writer), copy(store_reader, writer))

    async def serve() -> None:
        for listener in listeners:
            await asyncio.start_server(connect, sock=listener)
        await asyncio.Event().wait()

    asyncio.run(serve())
