"""A name server that learns names late: python late_dns.py REFUSALS NAME=ADDRESS...

Each name does not exist for the first REFUSALS questions after its IPv4 address; then it does. So a
cluster's name server answers for a pod that has just been made. Serves 127.0.0.1:53 for ever.
"""

import socket
import struct
import sys

A, NO_SUCH_NAME = 1, 3


def main() -> None:
    late = int(sys.argv[1])
    addresses = dict(word.split("=") for word in sys.argv[2:])
    asked = dict.fromkeys(addresses, 0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 53))
        print("serves", flush=True)
        while True:
            question, client = server.recvfrom(512)
            name, kind, end = read_question(question)
            known = name in addresses and asked[name] >= late
            if name in addresses and kind == A:
                asked[name] += 1
                print("knows" if known else "late", name, flush=True)
            answer = b""
            if known and kind == A:
                address = socket.inet_aton(addresses[name])
                answer = struct.pack(">HHHIH", 0xC00C, A, 1, 1, 4) + address
            # 0x8180: an answer, recursion desired and available.
            flags = 0x8180 | (0 if known else NO_SUCH_NAME)
            head = question[:2] + struct.pack(">HHHHH", flags, 1, bool(answer), 0, 0)
            server.sendto(head + question[12:end] + answer, client)


def read_question(packet: bytes) -> tuple[str, int, int]:
    """Name and type asked for, and where the question ends."""
    labels, at = [], 12
    while length := packet[at]:
        labels.append(packet[at + 1 : at + 1 + length].decode())
        at += 1 + length
    return ".".join(labels).lower(), int.from_bytes(packet[at + 1 : at + 3], "big"), at + 5


if __name__ == "__main__":
    main()
