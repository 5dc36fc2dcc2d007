"""README's chapter "On several machines": short sections, and torchrun's lines run."""

import json
import shlex

import pytest

from tests.lab import namespaces, readme
from tests.lab.machines import Lab

SECTIONS = ("By container", "By torchrun", "By SLURM", "By Kubernetes")
ENDPOINT = "192.168.1.10:29500"
TIMEOUT_S = 600  # for what takes seconds on a free machine

lacks = namespaces.missing()


@pytest.mark.parametrize("heading", SECTIONS)
def test_a_section_is_short_and_has_commands(heading):
    assert len(readme.section(heading).strip().splitlines()) <= 15
    assert readme.commands(heading)


def test_the_programs_named_are_those_that_the_tests_run():
    """A new command in these sections needs a test of its own."""
    lines = [line for heading in SECTIONS for line in readme.commands(heading)]
    heads = [next(word for word in shlex.split(line) if "=" not in word) for line in lines]
    assert sorted(heads) == sorted(
        "docker mkdir docker docker docker docker .venv/bin/ddp-launch .venv/bin/torchrun "
        "sbatch sbatch kubectl kubectl".split()
    )


@pytest.mark.platforms
@pytest.mark.skipif(bool(lacks), reason=lacks)
@pytest.mark.parametrize("number", range(2), ids=["ddp-launch", "torchrun"])
def test_torchruns_lines_train_on_two_machines(number, tmp_path, images_folder, shared_cache):
    line = readme.commands("By torchrun")[number]
    assert ENDPOINT in line and "--nproc-per-node 4" in line
    with Lab(2, tmp_path) as lab:
        here = f"{lab.machines[0].address}:29500"
        words = shlex.split(line.replace(ENDPOINT, here).replace("-node 4", "-node 1"))
        words[0] = words[0].rpartition("/")[2]
        words += f"--data {images_folder} --epochs 1 --data-dir {shared_cache}".split()
        programs = [machine.start(words, OMP_NUM_THREADS="1") for machine in lab.machines]
        for program in programs:
            assert program.wait(TIMEOUT_S) == 0, "\n".join(p.output for p in programs)
    [summary] = tmp_path.glob("machine*/runs/default/summary.json")
    assert json.loads(summary.read_text())["world_size"] == 2
    assert summary.with_name("cifar_net.pth").exists()
