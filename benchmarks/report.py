"""Saves the benchmarks' results, and makes the page of all results.

python benchmarks/report.py      writes benchmarks/RESULTS.md from results/*.json and tried.md

It also writes the first finding of each result into the README, except for tables of what happens. It
measures nothing.

A result file has: title; what (what was measured, and how); rows (each with name, unit and runs, which are
all single measurements; rows with other fields are shown as they are); findings (sentences with the
numbers that matter, the most important in the first); machine; versions; date.
"""

import json
import os
import platform
import re
import statistics
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results"
IN_TABLES = ("network_setups", "faults")  # their whole tables are in the README


def save(name: str, title: str, what: str, rows: list[dict[str, Any]], findings: list[str]) -> dict[str, Any]:
    """Writes results/<name>.json, with this machine, the versions and the date; returns its content."""
    result = {
        "title": title,
        "what": what,
        "rows": rows,
        "findings": findings,
        "machine": machine(),
        "versions": versions(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, and system."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": cpu, "cores": cores, "system": f"{platform.system()} {platform.machine()}"}


def versions() -> dict[str, str]:
    """The versions of Python, torch and ddp-lib."""
    by_name = {"python": platform.python_version()}
    for package in ("torch", "ddp-lib"):
        try:
            by_name[package] = version(package)
        except PackageNotFoundError:
            by_name[package] = "not installed"
    return by_name


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table: median, lowest, highest and number of runs of each row.

    For rows without `runs`, all their fields.
    """
    if "runs" not in rows[0]:
        columns = list(rows[0])
        numeric = [all(isinstance(row[name], (int, float)) for row in rows) for name in columns]
        lines = [columns, ["---:" if number else "---" for number in numeric]]
        lines += [[str(row[name]) for name in columns] for row in rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    lines = [
        "| | median | lowest | highest | runs |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        runs, unit = row["runs"], row["unit"]
        numbers = [f"{digits(f(runs))} {unit}" for f in (statistics.median, min, max)]
        lines.append(f"| {row['name']} | {' | '.join(numbers)} | {len(runs)} |")
    return "\n".join(lines)


def digits(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def section(result: dict[str, Any]) -> str:
    """One result as Markdown."""
    findings = "\n".join(f"- {finding}" for finding in result["findings"])
    return "\n\n".join([f"## {result['title']}", body(result), findings, source(result)])


def body(result: dict[str, Any]) -> str:
    return f"{result['what']}\n\n{table(result['rows'])}"


def source(result: dict[str, Any]) -> str:
    """The machine, the versions and the date of the measurement."""
    host = result["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    cpu = f"{host['cpu']}, {host['cores']} cores, {host['system']}"
    return f"{cpu}; {packages}; {result['date']}."


def into_readme(name: str, result: dict[str, Any]) -> None:
    """Writes the result's text, table and source between the README's marks for `name`."""
    between_marks(name, f"{body(result)}\n\nMeasured on {source(result)}")


def between_marks(name: str, text: str) -> None:
    readme = ROOT / "README.md"
    begin, end = f"<!-- {name}: written by benchmarks/{name}.py -->", f"<!-- {name}: end -->"
    before, _, rest = readme.read_text().partition(begin)
    _, end_mark, after = rest.partition(end)
    if not end_mark:
        raise SystemExit(f"README.md lacks {begin} ... {end}: add both lines")
    readme.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def main_figures(results: dict[str, dict[str, Any]]) -> str:
    """One line per result, by name: its main finding, machine, number of runs and date."""
    lines = []
    for result in results.values():
        if "runs" in result["rows"][0]:  # else it is a table, and no figure
            host = result["machine"]
            counts = sorted({len(row["runs"]) for row in result["rows"]})
            runs = f"runs: {counts[0]}" + (f" to {counts[-1]}" if counts[1:] else "")
            torch = f"torch {result['versions']['torch']}"
            anchor = re.sub(r"[^a-z0-9 ]", "", result["title"].lower()).replace(" ", "-")
            title = f"[{result['title']}](benchmarks/RESULTS.md#{anchor})"
            origin = f"{host['cpu']}, {host['cores']} cores; {torch}; {runs}; {result['date']}"
            lines.append(f"- {title}: {result['findings'][0]} ({origin})")
    return "\n".join(lines)


def main() -> None:
    results = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    intro = (
        "# Measurements\n\nMade by `make bench` and `make bench-full`, on the machine named under "
        "each table. All single runs are in `benchmarks/results/`."
    )
    tried = (HERE / "tried.md").read_text().rstrip()
    page = "\n\n".join([intro, *map(section, results.values()), tried]) + "\n"
    (HERE / "RESULTS.md").write_text(page)
    between_marks("report", main_figures(results))
    print(f"{HERE / 'RESULTS.md'}: {len(results)} result(s)")


if __name__ == "__main__":
    main()
