"""The image, built and run by podman, on a base image made here: no registry of images is asked.

A user's own build downloads what it needs; the test lends what this machine has: the base image is made
of Debian's packages, and the Python packages of this virtual environment are mounted into the build and
into the containers where both Pythons are of one version, so that pip finds what requirements.txt
pins and does not install some GB again. Otherwise pip installs them, as for a user.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.lab.project import ROOT

IMAGE = "localhost/ddp-training:latest"
BASE = "localhost/ddp-training-base:latest"
# What the Dockerfile's own base is: Debian bookworm with its Python.
_SUITE, _PYTHON = "bookworm", (3, 11)
_LENT = "/opt/lent"  # after all other folders of sys.path, by a .pth file of the base
_TOOLS = "podman buildah runc netavark aardvark-dns iptables mmdebstrap".split()
_TIMEOUT_S = 1800


def missing() -> str:
    """What this computer lacks to build and run the image, in one line; empty if nothing is missing."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "containers are run by root on Linux"
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/lib/podman"
    lacks = [tool for tool in _TOOLS if not shutil.which(tool, path=path)]
    return f"not installed: {' '.join(lacks)} (apt install {' '.join(_TOOLS)})" if lacks else ""


def run(command: list[str], timeout_s: float = _TIMEOUT_S, **environment: str) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


def lent() -> list[str]:
    """Mounts (FROM:TO) of this environment's packages."""
    if sys.version_info[:2] != _PYTHON:
        return []
    import torch

    packages = Path(torch.__file__).parents[1]
    jupyter = Path(sys.prefix) / "share" / "jupyter"
    return [f"{packages}:{_LENT}", f"{jupyter}:/usr/share/jupyter"]


def write_containers_conf(path: Path) -> None:
    """podman's settings: runc and these limits also work if the machine is itself a container.

    Each container takes one core: those of a test are machines that share this one.
    """
    path.write_text(
        "[containers]\n"
        'env = ["OMP_NUM_THREADS=1"]\n'
        'default_ulimits = ["nofile=4096:16384", "nproc=16384:16384"]\n'
        f"volumes = {json.dumps([f'{mount}:ro' for mount in lent()])}\n"
        '[engine]\nruntime = "runc"\n[network]\nnetwork_backend = "netavark"\n'
    )


def make_base() -> None:
    """A stand-in for python:3.11-slim-bookworm; kept, since it changes as rarely."""
    have = subprocess.run(["podman", "image", "exists", BASE], timeout=60)
    if have.returncode == 0:
        return
    links = "; ".join(
        f'ln -s /usr/bin/{there} "$1"/usr/local/bin/{here}'
        for here, there in (("python", "python3"), ("pip", "pip3"))
    )
    path = "/usr/local/lib/python3.11/dist-packages"
    hooks = (
        'rm -f "$1"/usr/lib/python3.11/EXTERNALLY-MANAGED',
        links,
        f'mkdir -p "$1"{_LENT} "$1"{path} && echo {_LENT} > "$1"{path}/lent.pth',
    )
    make = [
        *("mmdebstrap --quiet --variant=minbase".split()),
        "--include=ca-certificates,netbase,tzdata,python3,python3-pip,python3-venv",
        "--dpkgopt=path-exclude=/usr/share/man/*",
        "--dpkgopt=path-exclude=/usr/share/doc/*",
        *(f"--customize-hook={hook}" for hook in hooks),
        _SUITE,
        "-",
    ]
    with subprocess.Popen(make, stdout=subprocess.PIPE) as tree:
        subprocess.run(
            ["podman", "import", "--change", "ENV LANG=C.UTF-8", "-", BASE],
            stdin=tree.stdout,
            check=True,
            timeout=_TIMEOUT_S,
        )
    assert tree.returncode == 0


def build(folder: Path) -> None:
    """`docker build -t ddp-training .`, with what this machine's pip needs lent to it."""
    make_base()
    settings, paths = _pip_settings()
    pip_conf = folder / "pip.conf"
    pip_conf.write_text(settings)
    # An overlay: if a pin differs for the image's Python, pip replaces the package for itself.
    mounts = [f"{mount}:O" for mount in lent()]
    mounts += [f"{pip_conf}:/etc/pip.conf:ro", *(f"{path}:{path}:ro" for path in paths)]
    volumes = [word for mount in mounts for word in ("--volume", mount)]
    options = "--format docker --isolation chroot --network host --layers --pull-never".split()
    run(["buildah", "bud", *options, *volumes, "--from", BASE, "--tag", IMAGE, "."])


def _pip_settings() -> tuple[str, list[str]]:
    """This machine's settings of pip, from all its files and variables, and the paths they name."""
    listed = run([sys.executable, "-m", "pip", "config", "list"], timeout_s=60)
    values = {}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        if section in ("global", "install", ":env:"):
            values[key] = value[1:-1].replace("\\n", " ").replace("\\t", " ")
    words = [word.removeprefix("file://") for value in values.values() for word in value.split()]
    # An index often keeps its files beside itself.
    paths = {str(Path(word)) for word in words if word.startswith("/") and Path(word).exists()}
    paths |= {str(Path(path).parent) for path in paths if Path(path).name == "simple"}
    lines = [f"{key} = {value}" for key, value in values.items()]
    return "[global]\n" + "\n".join(lines) + "\n", sorted(paths)
