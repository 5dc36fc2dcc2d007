"""What every benchmark writes, and the page made of it.

python benchmarks/report.py      writes benchmarks/RESULTS.md from results/*.json and tried.md

It writes the first finding of each into the README too, but for those that stand there as a table.

A result file holds: title, what (a sentence: what was measured, and how), rows (each with name,
unit and runs, all the single measurements; or, with other fields, a table of those), findings
(sentences with the numbers that matter, the main ones in the first), machine, versions, date.
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
IN_TABLES = ("network_setups", "faults")  # whole in the README


def save(
    name: str, title: str, what: str, rows: list[dict[str, Any]], findings: list[str]
) -> dict[str, Any]:
    """Writes results/<name>.json with the machine it ran on, and returns its content."""
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
        named = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = named[0].partition(":")[2].strip() if named else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": cpu, "cores": cores, "system": f"{platform.system()} {platform.machine()}"}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "ddp-lib"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line a row with median, lowest, highest and the number of runs.

    Rows without `runs` show their fields.
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
    """Where and with what it was measured."""
    where, used = result["machine"], result["versions"]
    packages = ", ".join(f"{name} {number}" for name, number in used.items())
    cpu = f"{where['cpu']}, {where['cores']} cores, {where['system']}"
    return f"{cpu}; {packages}; {result['date']}."


def into_readme(name: str, result: dict[str, Any]) -> None:
    """Puts the result's text, table and source between the README's marks for `name`."""
    between_marks(name, f"{body(result)}\n\nMeasured on {source(result)}")


def between_marks(name: str, text: str) -> None:
    readme = ROOT / "README.md"
    begin, end = f"<!-- {name}: written by benchmarks/{name}.py -->", f"<!-- {name}: end -->"
    before, _, rest = readme.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"README.md lacks {begin} ... {end}")
    readme.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def main_figures(found: dict[str, dict[str, Any]]) -> str:
    """A line a result, by name, with the number of runs of its rows, its machine and date."""
    lines = []
    for name, result in found.items():
        if name not in IN_TABLES:
            where = result["machine"]
            counts = sorted({len(row["runs"]) for row in result["rows"]})
            runs = f"runs: {counts[0]}" + (f" to {counts[-1]}" if counts[1:] else "")
            on = f"{where['cpu']}, {where['cores']} cores; torch {result['versions']['torch']}; {runs}"
            there = re.sub(r"[^a-z0-9 ]", "", result["title"].lower()).replace(" ", "-")
            title = f"[{result['title']}](benchmarks/RESULTS.md#{there})"
            lines.append(f"- {title}: {result['findings'][0]} ({on}; {result['date']})")
    return "\n".join(lines)


def main() -> None:
    found = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    intro = (
        "# Measurements\n\nMade by `make bench` and `make bench-full`, on the machine named under "
        "each table. All single runs are in `benchmarks/results/`."
    )
    tried = (HERE / "tried.md").read_text().rstrip()
    page = "\n\n".join([intro, *map(section, found.values()), tried]) + "\n"
    (HERE / "RESULTS.md").write_text(page)
    between_marks("report", main_figures(found))
    print(f"{HERE / 'RESULTS.md'}: {len(found)} result(s)")


if __name__ == "__main__":
    main()
