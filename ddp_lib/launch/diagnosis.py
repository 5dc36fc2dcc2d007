"""What ddp-launch check concludes from the machines' reports: pure functions of plain values."""

from typing import Any

from ddp_lib.distributed.addresses import join_host

# Enough for the checkpoints and logs of all models in this project.
_LEAST_FREE = 1 << 30
_CLOCK_S = 1.0

Report = dict[str, Any]  # of one machine: see check.report
# "links": its connection to each machine, "rate": bytes per second to the next.
Measured = dict[str, Any]


def causes(reports: list[Report], measured: list[Measured | None], waited_s: float) -> list[str]:
    """One line, with its cure, per problem that would keep the machines from training together.

    reports: of the machines that came, the store's host first. measured: by each; None if it did not
    finish.
    """
    return [
        *_who(reports, waited_s),
        *_connections(reports, measured),
        *_equal(reports),
        *_clocks(reports, measured),
        *(line for report in reports for line in _own(report)),
    ]


def _who(reports: list[Report], waited_s: float) -> list[str]:
    """Sizes that differ, numbers given twice or missing, machines that did not come."""
    lines = []
    size_name, rank_name = reports[0]["size_name"], reports[0]["rank_name"]
    for report in reports[1:]:
        if report["size"] != reports[0]["size"]:
            lines.append(
                f"{size_name} is {report['size']} on {name(report)}, but {reports[0]['size']} on "
                f"{name(reports[0])}: set the same on every machine"
            )
    holders: dict[int, Report] = {}
    for report in reports:
        if report["rank"] is not None and holders.setdefault(report["rank"], report) is not report:
            lines.append(
                f"{rank_name}={report['rank']} is set on {name(holders[report['rank']])} and on "
                f"{name(report)}: give each a number of its own, from 0"
            )
    size = reports[0]["size"]
    if len(reports) < size:
        absent = ""
        if holders:
            numbers = [str(n) for n in range(size) if n not in holders]
            absent = f" ({rank_name} {', '.join(numbers)})"
        came = ", ".join(name(report) for report in reports)
        lines.append(
            f"{size - len(reports)} of {size} machines{absent} did not come within {waited_s:.0f} s; "
            f"came: {came}: start the check there too, or lower {size_name}"
        )
    return lines


def _connections(reports: list[Report], measured: list[Measured | None]) -> list[str]:
    lines, hidden = [], set()
    for number, report in enumerate(reports):
        own = measured[number]
        seen = {link["seen_as"] for link in own["links"] if link["seen_as"]} if own else set()
        others = seen - {report["address"]}
        if others:
            hidden.add(number)
            lines.append(
                f"{name(report)} arrives at other machines from {', '.join(sorted(others))}: its own "
                "address is a private one behind another machine's, as in a container with a network of "
                "its own; start the container with --network host"
            )
    for number, report in enumerate(reports):
        if number in hidden:
            continue
        failed = [
            (name(reports[i]), own["links"][number]["trouble"])
            for i, own in enumerate(measured)
            if own and i != number and own["links"][number]["trouble"]
        ]
        if failed:
            whose = ", ".join(f"{machine}'s connection {trouble}" for machine, trouble in failed)
            lines.append(
                f"{name(report)} cannot be reached on the ports that the system picks (tried "
                f"{join_host(*report['probe'])}; {whose}): gloo and NCCL use such ports, so open all "
                "ports between the machines, not the master's alone"
            )
    for number, own in enumerate(measured):
        if own is None:
            lines.append(f"{name(reports[number])} came, but did not finish: look at its output")
    return lines


def _equal(reports: list[Report]) -> list[str]:
    lines = []
    for what, cure in (
        ("torch", "install the same version on every machine"),
        ("ddp_lib", "install the same version on every machine"),
        ("data", "copy the same data to every machine"),
    ):
        for report in reports[1:]:
            mine, first = report[what], reports[0][what]
            if mine and first and mine != first and "not ready" not in (mine, first):
                lines.append(f"{what} is {mine} on {name(report)}, but {first} on {name(reports[0])}: {cure}")
    with_gpus = [report for report in reports if report["gpus"] >= report["ranks"]]
    if with_gpus and all(report["backend"] == "auto" for report in reports):
        for report in reports:
            if report not in with_gpus:
                lines.append(
                    f"{name(report)} has {report['gpus']} GPU(s) for {report['ranks']} rank(s), but "
                    f"{name(with_gpus[0])} has {with_gpus[0]['gpus']}: all would train on gloo and the "
                    "CPU; install the driver there, or say --backend gloo"
                )
    return lines


def _clocks(reports: list[Report], measured: list[Measured | None]) -> list[str]:
    return [
        f"the clock of {name(reports[number])} is {abs(ahead_s):.1f} s "
        f"{'ahead of' if ahead_s > 0 else 'behind'} {name(reports[0])}'s: set it (chrony, ntp), or the "
        "logs of the ranks cannot be laid side by side"
        for number, own in enumerate(measured)
        if own and number and abs(ahead_s := -own["links"][0]["clock_s"]) > _CLOCK_S
    ]


def _own(report: Report) -> list[str]:
    """Problems of a single machine."""
    lines = [f"{name(report)}: {line}" for line in report["troubles"]]
    if report["backend"] == "nccl" and report["gpus"] < report["ranks"]:
        lines.append(
            f"{name(report)} has {report['gpus']} GPU(s) for {report['ranks']} rank(s): --backend nccl needs "
            "one each; install the driver there, start fewer ranks, or say --backend gloo"
        )
    if report["free"] < _LEAST_FREE:
        lines.append(
            f"{name(report)} has {report['free'] / 1e9:.2f} GB free where --run-dir is: free some, "
            "checkpoints need it"
        )
    return lines


def table(reports: list[Report], measured: list[Measured | None]) -> str:
    """One line per machine."""
    head = "machine address interface reaches latency to-next clock torch GPUs ranks free data".split()
    lines = [head]
    for number, (report, own) in enumerate(zip(reports, measured, strict=True)):
        lines.append(
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
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _measured(number: int, own: Measured | None) -> list[str]:
    if own is None:
        return ["?"] * 4
    others = [link for i, link in enumerate(own["links"]) if i != number]
    good = [link for link in others if not link["trouble"]]
    latency = f"{max(link['latency_s'] for link in good) * 1e3:.2f} ms" if good else "-"
    ahead = "-"
    if number == 0:
        ahead = "0 ms"
    elif not own["links"][0]["trouble"]:
        ahead = f"{-own['links'][0]['clock_s'] * 1e3:+.0f} ms"
    rate = f"{own['rate'] * 8 / 1e9:.2f} Gbit/s" if own["rate"] else "-"
    return [f"{len(good)} of {len(others)}", latency, rate, ahead]


def name(report: Report) -> str:
    return f"{report['host']} ({report['address'] or 'no address'})"
