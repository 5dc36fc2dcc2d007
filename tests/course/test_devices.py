"""With or without GPUs: what the notebooks' ranks choose on machines with 1, 2 and 4 of them.

Two stand-ins for these machines. `tests/lab/record_devices.py` records the choice of every rank of every
notebook, and starts none. `tests/lab/pretended_gpus` lets real ranks choose, and compute on the CPU: those of
the cells where it matters. All others do the same as where the notebooks are run without GPUs.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.notebooks import NOTEBOOKS, code_cells, read, source
from tests.lab.project import ROOT

RECORDER = ROOT / "tests" / "lab" / "record_devices.py"

# Cells whose ranks take GPUs where each can have one of its own: notebook, cell, what it launches, and the
# number of ranks. All others mean the CPU.
ON_GPUS = {
    ("01_process_groups", "cell-07", "join_by_library"): 4,
    ("01_process_groups", "cell-08a", "on_own_device"): 2,
    ("01_process_groups", "ranks-01", "%ranks 4"): 4,
    ("03_ddp_wrapping", "cell-15", "%ranks 2"): 2,
    ("04_training_run", "device-02", "on_its_device"): 2,
}
# Cells that mean the CPU, where torch looks for GPUs by itself: PowerSGD's hook.
LOOKING = {("08_scaling", cell) for cell in ("cell-21", "cell-22", "cell-23")}


def kind(ranks: list[list[str]]) -> str:
    """What the ranks of one launch chose together. Machines that `run_nodes` rehearses share their GPUs."""
    if not ranks:
        return "no group"
    backends, devices = zip(*ranks, strict=True)
    if set(backends) <= {"gloo", "none"} and set(devices) == {"cpu"}:
        return "cpu"
    if "refused" in backends:
        return "refused"
    own = len(set(devices)) == len(devices) and all(device.startswith("cuda:") for device in devices)
    joined = set(backends) <= {"nccl", "cpu:gloo,cuda:nccl"} or len(ranks) == 1
    return "a GPU each" if own and joined else f"clash: {sorted(set(zip(backends, devices, strict=True)))}"


def wrong_choices(launches: list[dict]) -> list[str]:
    wrong = []
    for launch in launches:
        where = launch["notebook"], launch["cell"], launch["launch"]
        for gpus, ranks in launch["chosen"].items():
            wanted = {"cpu", "no group"}
            if where in ON_GPUS:
                wanted = {"a GPU each" if int(gpus) >= ON_GPUS[where] else "cpu"}
            if kind(ranks) not in wanted:
                wrong.append(f"{', '.join(where)}, {gpus} GPU(s): {kind(ranks)}")
    return wrong


@pytest.mark.process
def test_every_rank_gets_the_cpu_or_a_gpu_of_its_own(tmp_path):
    command = [sys.executable, str(RECORDER), *map(str, NOTEBOOKS)]
    env = os.environ | {"TMPDIR": str(tmp_path)}  # for what the notebooks leave behind
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    launches = [json.loads(line) for line in done.stdout.splitlines()]
    assert wrong_choices(launches) == []
    made = {(launch["notebook"], launch["cell"], launch["launch"]) for launch in launches}
    assert made >= ON_GPUS.keys()


def cells_on_gpus() -> Iterator[tuple[str, dict]]:
    """The cells of ON_GPUS and LOOKING, each with its notebook, and those around them: imports, and what runs
    on ranks that stay."""
    ids = {(notebook, cell) for notebook, cell, _ in ON_GPUS} | LOOKING
    for path in NOTEBOOKS:
        cells = code_cells(read(path))
        for cell in cells if path.stem in {notebook for notebook, _ in ids} else []:
            if cell is cells[0] or (path.stem, cell["id"]) in ids or source(cell).startswith("%%ranks"):
                yield path.stem, cell


@pytest.mark.ranks
@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_cells_that_take_gpus_compute_on_them(gpus, tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    log, stand_in = tmp_path / "log", ROOT / "tests" / "lab" / "pretended_gpus"
    monkeypatch.setenv("PRETENDED_GPUS", str(gpus))
    monkeypatch.setenv("PRETENDED_LOG", str(log))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(stand_in), str(ROOT)]))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cells, kinds = [*cells_on_gpus()], []

    def take_choices(cell_index: int, **_: object) -> None:
        kinds.append([kind(ranks) for ranks in noted(log)])
        log.unlink(missing_ok=True)

    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(source(cell)) for _, cell in cells]
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=120, on_cell_executed=take_choices, resources=where).execute()
    chosen = {(name, cell["id"]): of_cell for (name, cell), of_cell in zip(cells, kinds, strict=True)}
    for (name, cell, _), ranks in ON_GPUS.items():
        expected = "a GPU each" if ranks <= gpus else "cpu"
        assert expected in chosen[name, cell], (name, cell, chosen[name, cell])
        chosen[name, cell].remove(expected)
    assert {choice for of_cell in chosen.values() for choice in of_cell} == {"cpu"}, chosen


def noted(log: Path) -> list[list[list[str]]]:
    """For each launch the [backend, device] of its ranks, as the stand-in has noted them."""
    launches: dict[str, dict[str, dict[str, set[str]]]] = {}
    for line in log.read_text().splitlines() if log.exists() else []:
        port, rank, what, choice = json.loads(line)
        launches.setdefault(port, {}).setdefault(rank, {"backend": set(), "device": set()})[what].add(choice)
    return [
        [["+".join(own["backend"]), "+".join(own["device"]) or "cpu"] for own in ranks.values()]
        for ranks in launches.values()
    ]


def test_a_rank_on_another_one_s_gpu_is_seen():
    def launch(*ranks: list[str], name: str = "f") -> list[dict]:
        where = {"notebook": "01_process_groups", "cell": "cell-08a", "launch": name}
        return [where | {"chosen": {"2": [*ranks]}}]

    gpu_0, gpu_1, cpu = ["nccl", "cuda:0"], ["nccl", "cuda:1"], ["gloo", "cpu"]
    assert wrong_choices(launch(cpu, cpu)) == []
    assert wrong_choices(launch(gpu_0, gpu_1, name="on_own_device")) == []
    for ranks in ((gpu_0, gpu_1), (gpu_0, gpu_0), (cpu, gpu_0), (["none", "cuda:0"],)):
        assert len(wrong_choices(launch(*ranks))) == 1
    assert len(wrong_choices(launch(gpu_0, gpu_0, name="on_own_device"))) == 1
