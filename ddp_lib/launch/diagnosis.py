"""What ddp-launch check concludes from the machines' reports: pure functions of plain values."""

from collections.abc import Iterator
from typing import Any

from ddp_lib.distributed.addresses import join_host

# Enough for the checkpoints and logs of all models in this project.
_LEAST_FREE = 1 << 30
_CLOCK_S = 1.0

Report = dict[str, Any]  # of one machine: see check.report
# "links": its connections to other machines by their numbers, "rate": bytes per second to the next.
Measured = dict[str, Any]


def causes(reports: list[Report], measured: list[Measured | None], waited_s: float) -> list[str]:
    """One line, with its cure, per problem that would keep the machines from training together.

    reports: of the machines that came, the store's host first. measured: by each; None if it did not finish.
    """
    return [
        *_who(reports, waited_s),
        *_connections(reports, measured),
        *_equal(reports),
        *_clocks(reports, measured),
        *(line for report in reports for line in _own(report)),
    ]


def _who(reports: list[Report], waited_s: float) -> Iterator[str]:
    """Sizes that differ, numbers given twice or missing, machines that did not come."""
    size, size_name, rank_name = (reports[0][key] for key in ("size", "size_name", "rank_name"))
    for report in reports[1:]:
        if report["size"] != size:
            yield (
                f"{size_name} is {report['size']} on {name(report)}, but {size} on {name(reports[0])}: set "
                "the same on every machine"
            )
    holders: dict[int, Report] = {}
    for report in reports:
        rank = report["rank"]
        if rank is not None and holders.setdefault(rank, report) is not report:
            yield (
                f"{rank_name}={rank} is set on {name(holders[rank])} and on {name(report)}: give each a "
                "number of its own, from 0"
            )
    if len(reports) < size:
        numbers = ", ".join(str(n) for n in range(size) if n not in holders)
        absent = f" ({rank_name} {numbers})" if holders else ""
        yield (
            f"{size - len(reports)} of {size} machines{absent} did not come within {waited_s:.0f} s; came: "
            f"{', '.join(map(name, reports))}: start the check there too, or lower {size_name}"
        )


def _connections(reports: list[Report], measured: list[Measured | None]) -> Iterator[str]:
    hidden = set()
    for number, (report, own) in enumerate(zip(reports, measured, strict=True)):
        seen_as = {link["seen_as"] for link in own["links"].values()} if own else set()
        others = seen_as - {"", report["address"]}
        if others:
            hidden.add(number)
            yield (
                f"{name(report)} arrives at other machines from {', '.join(sorted(others))}: its own address "
                "is a private one behind another machine's, as in a container with a network of its own; "
                "start the container with --network host"
            )
    for number, report in enumerate(reports):
        failed = [
            f"{name(other)}'s connection {own['links'][str(number)]['trouble']}"
            for other, own in zip(reports, measured, strict=True)
            if own and str(number) in own["links"] and own["links"][str(number)]["trouble"]
        ]
        if failed and number not in hidden:
            yield (
                f"{name(report)} cannot be reached on the ports that the system picks (tried "
                f"{join_host(*report['probe'])}; {', '.join(failed)}): gloo and NCCL use such ports, so open "
                "all ports between the machines, not the master's alone"
            )
    for report, own in zip(reports, measured, strict=True):
        if own is None:
            yield f"{name(report)} came, but did not finish: look at its output"


def _equal(reports: list[Report]) -> Iterator[str]:
    for what, cure in (
        ("torch", "install the same version on every machine"),
        ("ddp_lib", "install the same version on every machine"),
        ("data", "copy the same data to every machine"),
    ):
        first = reports[0][what]
        for report in reports[1:]:
            mine = report[what]
            if mine and first and mine != first and "not ready" not in (mine, first):
                yield f"{what} is {mine} on {name(report)}, but {first} on {name(reports[0])}: {cure}"
    with_gpus = [report for report in reports if report["gpus"] >= report["ranks"]]
    if with_gpus and all(report["backend"] == "auto" for report in reports):
        for report in reports:
            if report not in with_gpus:
                yield (
                    f"{name(report)} has {report['gpus']} GPU(s) for {report['ranks']} rank(s), but "
                    f"{name(with_gpus[0])} has {with_gpus[0]['gpus']}: training is refused; install the "
                    "driver there, or say --backend gloo, to train on the CPU"
                )


def _clocks(reports: list[Report], measured: list[Measured | None]) -> Iterator[str]:
    for report, own in zip(reports[1:], measured[1:], strict=True):
        ahead_s = -own["links"]["0"]["clock_s"] if own else 0.0
        if abs(ahead_s) > _CLOCK_S:
            where = f"{'ahead of' if ahead_s > 0 else 'behind'} {name(reports[0])}'s"
            yield (
                f"the clock of {name(report)} is {abs(ahead_s):.1f} s {where}: set it (chrony, ntp), or the "
                "logs of the ranks cannot be laid side by side"
            )


def _own(report: Report) -> Iterator[str]:
    """Problems of a single machine."""
    for line in report["troubles"]:
        yield f"{name(report)}: {line}"
    if report["backend"] == "nccl" and report["gpus"] < report["ranks"]:
        yield (
            f"{name(report)} has {report['gpus']} GPU(s) for {report['ranks']} rank(s): --backend nccl needs "
            "one each; install the driver there, start fewer ranks, or say --backend gloo"
        )
    if report["free"] < _LEAST_FREE:
        free = f"{report['free'] / 1e9:.2f} GB free"
        yield f"{name(report)} has {free} where --run-dir is: free some, checkpoints need it"


def table(reports: list[Report], measured: list[Measured | None]) -> str:
    """One line per machine, and one that says what the table does not show."""
    rows = ["machine address interface reaches latency to-next clock torch GPUs ranks free data".split()]
    for number, (report, own) in enumerate(zip(reports, measured, strict=True)):
        rows.append(
            [
                report["host"] + (" (master)" if report["hosts"] else ""),
                report["address"] or "none",
                report["interface"] or "?",
                *_measured(number, own),
                report["torch"],
                str(report["gpus"]),
                str(report["ranks"]),
                f"{report['free'] / 1e9:.0f} GB",
                report["data"] or "-",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, "not tested: NCCL (the rates are TCP's; --gpus tests it)"])


def _measured(number: int, own: Measured | None) -> list[str]:
    if own is None:
        return ["?"] * 4
    links = own["links"].values()
    good = [link["latency_s"] for link in links if not link["trouble"]]
    latency = f"{max(good) * 1e3:.2f} ms" if good else "-"
    ahead = "0 ms" if number == 0 else "-"
    if number and not own["links"]["0"]["trouble"]:
        ahead = f"{-own['links']['0']['clock_s'] * 1e3:+.0f} ms"
    rate = f"{own['rate'] * 8 / 1e9:.2f} Gbit/s" if own["rate"] else "-"
    return [f"{len(good)} of {len(links)}", latency, rate, ahead]


def name(report: Report) -> str:
    return f"{report['host']} ({report['address'] or 'no address'})"
