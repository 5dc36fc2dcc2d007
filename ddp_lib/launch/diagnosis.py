"""What ddp-launch check concludes from what the machines found: pure functions of plain values."""

from typing import Any

from ddp_lib.distributed.addresses import join_host

# Enough for checkpoints and logs of anything that this project trains.
_LEAST_FREE = 1 << 30
_CLOCK_S = 1.0

Card = dict[str, Any]  # what a machine says of itself: see check.card
Row = dict[str, Any]  # what it found: "links", one for each card, and "rate", bytes a second


def causes(cards: list[Card], rows: list[Row | None], waited_s: float) -> list[str]:
    """One line for each thing that would keep the machines from training together, with its cure.

    cards: of the machines that came, the host of the store first; rows: what each found, None where it
    did not say.
    """
    return [
        *_who(cards, waited_s),
        *_connections(cards, rows),
        *_equal(cards),
        *_clocks(cards, rows),
        *(line for card in cards for line in _own(card)),
    ]


def _who(cards: list[Card], waited_s: float) -> list[str]:
    """Sizes that differ, numbers given twice or to nobody, machines that did not come."""
    found = []
    size_name, rank_name = cards[0]["size_name"], cards[0]["rank_name"]
    for card in cards[1:]:
        if card["size"] != cards[0]["size"]:
            found.append(
                f"{size_name} is {card['size']} on {name(card)}, but {cards[0]['size']} on "
                f"{name(cards[0])}: set the same on every machine"
            )
    holders: dict[int, Card] = {}
    for card in cards:
        if card["rank"] is not None and holders.setdefault(card["rank"], card) is not card:
            found.append(
                f"{rank_name}={card['rank']} is set on {name(holders[card['rank']])} and on "
                f"{name(card)}: give each a number of its own, from 0"
            )
    size = cards[0]["size"]
    if len(cards) < size:
        absent = ""
        if holders:
            numbers = [str(n) for n in range(size) if n not in holders]
            absent = f" ({rank_name} {', '.join(numbers)})"
        came = ", ".join(name(card) for card in cards)
        found.append(
            f"{size - len(cards)} of {size} machines{absent} did not come within {waited_s:.0f} s; "
            f"came: {came}: start the check there too, or lower {size_name}"
        )
    return found


def _connections(cards: list[Card], rows: list[Row | None]) -> list[str]:
    found, hidden = [], set()
    for number, card in enumerate(cards):
        row = rows[number]
        seen = {link["seen_as"] for link in row["links"] if link["seen_as"]} if row else set()
        others = seen - {card["address"]}
        if others:
            hidden.add(number)
            found.append(
                f"{name(card)} arrives at other machines from {', '.join(sorted(others))}: its own "
                "address is a private one behind another machine's, as in a container with a network of "
                "its own; start the container with --network host"
            )
    for number, card in enumerate(cards):
        if number in hidden:
            continue
        failed = [
            (name(cards[i]), row["links"][number]["trouble"])
            for i, row in enumerate(rows)
            if row and i != number and row["links"][number]["trouble"]
        ]
        if failed:
            whose = ", ".join(f"{who}'s connection {trouble}" for who, trouble in failed)
            found.append(
                f"{name(card)} cannot be reached on the ports that the system picks (tried "
                f"{join_host(*card['probe'])}; {whose}): gloo and NCCL use such ports, so open all "
                "ports between the machines, not the master's alone"
            )
    for number, row in enumerate(rows):
        if row is None:
            found.append(f"{name(cards[number])} came, but did not finish: look at its output")
    return found


def _equal(cards: list[Card]) -> list[str]:
    found = []
    for what, cure in (
        ("torch", "install the same version on every machine"),
        ("ddp_lib", "install the same version on every machine"),
        ("data", "copy the same data to every machine"),
    ):
        for card in cards[1:]:
            mine, first = card[what], cards[0][what]
            if mine and first and mine != first and "not ready" not in (mine, first):
                found.append(
                    f"{what} is {mine} on {name(card)}, but {first} on {name(cards[0])}: {cure}"
                )
    with_gpus = [card for card in cards if card["gpus"] >= card["ranks"]]
    if with_gpus and all(card["backend"] == "auto" for card in cards):
        for card in cards:
            if card not in with_gpus:
                found.append(
                    f"{name(card)} has {card['gpus']} GPU(s) for {card['ranks']} rank(s), but "
                    f"{name(with_gpus[0])} has {with_gpus[0]['gpus']}: all would train on gloo and the "
                    "CPU; install the driver there, or say --backend gloo"
                )
    return found


def _clocks(cards: list[Card], rows: list[Row | None]) -> list[str]:
    return [
        f"the clock of {name(cards[number])} is {abs(ahead_s):.1f} s "
        f"{'ahead of' if ahead_s > 0 else 'behind'} {name(cards[0])}'s: set it (chrony, ntp), or the "
        "logs of the ranks cannot be laid side by side"
        for number, row in enumerate(rows)
        if row and number and abs(ahead_s := -row["links"][0]["clock_s"]) > _CLOCK_S
    ]


def _own(card: Card) -> list[str]:
    """What is wrong with one machine alone."""
    found = [f"{name(card)}: {line}" for line in card["troubles"]]
    if card["backend"] == "nccl" and card["gpus"] < card["ranks"]:
        found.append(
            f"{name(card)} has {card['gpus']} GPU(s) for {card['ranks']} rank(s): --backend nccl needs "
            "one each; install the driver there, start fewer ranks, or say --backend gloo"
        )
    if card["free"] < _LEAST_FREE:
        found.append(
            f"{name(card)} has {card['free'] / 1e9:.2f} GB free where --run-dir is: free some, checkpoints "
            "need it"
        )
    return found


def table(cards: list[Card], rows: list[Row | None]) -> str:
    """One line a machine."""
    head = (
        "machine address interface reaches latency to-next clock torch GPUs ranks free data".split()
    )
    lines = [head]
    for number, (card, row) in enumerate(zip(cards, rows, strict=True)):
        lines.append(
            [
                card["host"] + (" (master)" if card["hosts"] else ""),
                card["address"] or "none",
                card["interface"] or "?",
                *_measured(number, row),
                card["torch"],
                str(card["gpus"]),
                str(card["ranks"]),
                f"{card['free'] / 1e9:.0f} GB",
                card["data"] or "-",
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _measured(number: int, row: Row | None) -> list[str]:
    if row is None:
        return ["?"] * 4
    others = [link for i, link in enumerate(row["links"]) if i != number]
    good = [link for link in others if not link["trouble"]]
    latency = f"{max(link['latency_s'] for link in good) * 1e3:.2f} ms" if good else "-"
    ahead = "-"
    if number == 0:
        ahead = "0 ms"
    elif not row["links"][0]["trouble"]:
        ahead = f"{-row['links'][0]['clock_s'] * 1e3:+.0f} ms"
    rate = f"{row['rate'] * 8 / 1e9:.2f} Gbit/s" if row["rate"] else "-"
    return [f"{len(good)} of {len(others)}", latency, rate, ahead]


def name(card: Card) -> str:
    return f"{card['host']} ({card['address'] or 'no address'})"
