"""The image and compose.yaml, built and run; README's own lines, with podman instead of docker."""

import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from tests.lab import containers, namespaces, readme
from tests.lab.containers import IMAGE
from tests.lab.machines import Lab
from tests.lab.ports import free_port
from tests.lab.project import ROOT

TIMEOUT_S = 600  # for what takes seconds on a free machine
COMPOSE = ROOT / "deploy" / "compose.yaml"
README_MASTER = "192.168.1.10"
OWNER = 4321  # of the mounted folders: a number that the image does not know

lacks = namespaces.missing() or containers.missing()


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The image is built; gives the environment in which `docker` and `podman` run it."""
    folder = tmp_path_factory.mktemp("podman")
    conf, bin_ = folder / "containers.conf", folder / "bin"
    containers.write_containers_conf(conf)
    bin_.mkdir()
    (bin_ / "docker").symlink_to(shutil.which("podman") or "podman")
    path = f"{bin_}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTAINERS_CONF", str(conf))
        patch.setenv("PATH", path)
        containers.build(folder)
        yield dict(os.environ)


@pytest.fixture
def folder(tmp_path: Path, images_folder: Path) -> Path:
    """Where a reader stands, with a data set in `data`; `runs` and `data` are another user's."""
    tmp_path.chmod(0o755)
    (tmp_path / "runs").mkdir()
    shutil.copytree(images_folder, tmp_path / "data" / "pictures")
    (tmp_path / "data" / "pictures").chmod(0o755)
    for name in ("runs", "data"):
        os.chown(tmp_path / name, OWNER, OWNER)
    return tmp_path


DATA = "--data data/pictures"  # as seen from the image's working directory


def on_a_terminal(command: list[str], cwd: Path) -> tuple[int, str]:
    """Status and output of a command on a terminal of its own, as `docker run -it` wants one."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, cwd=cwd, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        while True:
            try:
                part = terminal.read(65536)
            except OSError:  # Linux's word for: nobody has the other end any more
                break
            if not part:
                break
            seen += part
    return process.wait(TIMEOUT_S), seen.decode(errors="replace")


def docker_lines(*words: str) -> list[str]:
    return [line for line in readme.commands("By container") if all(w in line for w in words)]


def run(*words: str) -> "subprocess.CompletedProcess[str]":
    command = ["podman", "run", "--rm", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)


# The files


@pytest.mark.process
def test_composes_file_is_valid_and_a_changed_name_is_seen(tmp_path):
    def status(text: str) -> int:
        path = tmp_path / "compose.yaml"
        path.write_text(text)
        command = ["-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
        done = subprocess.run([sys.executable, *command], capture_output=True, timeout=TIMEOUT_S)
        return done.returncode

    text = COMPOSE.read_text()
    assert status(text) == 0 == status((COMPOSE.parent / "compose.gpu.yaml").read_text())
    for good, bad in (("shm_size", "shm_siz"), ("profiles: [notebook]", "profiles: 3")):
        assert good in text and status(text.replace(good, bad)) == 1


def test_compose_and_readme_start_the_same_run():
    """The same four variables, by -e and by compose."""
    nodes = yaml.safe_load(COMPOSE.read_text())["services"]
    for rank, line in enumerate(docker_lines("RANK=")):
        given = dict(word.split("=") for word in re.findall(r"-e (\S+)", line))
        given["MASTER_ADDR"] = "node0"
        assert given == nodes[f"node{rank}"]["environment"]


# The image


@pytest.mark.platforms
@pytest.mark.skipif(bool(lacks), reason=lacks)
class TestImage:
    def test_readme_builds_what_is_tested(self, podman):
        [line] = docker_lines("docker build")
        assert line == "docker build -t ddp-training ."
        image = json.loads(containers.run(["podman", "image", "inspect", IMAGE]))[0]["Config"]
        assert image["User"] == "1000:1000"
        assert "PIP_EXTRA_INDEX_URL" not in "".join(image["Env"])

    def test_readmes_lines_train_on_two_machines(self, podman, folder):
        lines = docker_lines("--network host", "RANK=")
        with Lab(2, folder) as lab, ThreadPoolExecutor() as pool:
            runs = []
            for machine, line in zip(lab.machines, lines, strict=True):
                line = line.replace(README_MASTER, lab.machines[0].address) + " " + DATA
                network = f"--net=/proc/{machine.namespaces.pid}/ns/net"
                command = ["nsenter", network, "bash", "-c", line]
                runs.append(pool.submit(on_a_terminal, command, folder))
            ends = [run.result(3 * TIMEOUT_S) for run in runs]
        print(*(output for _, output in ends), sep="\n")
        assert [status for status, _ in ends] == [0, 0], ends
        assert "2 rank(s)" in ends[0][1] and "lies inside this container" not in ends[0][1]
        left = {path.name: path for path in (folder / "runs" / "default").iterdir()}
        assert {"cifar_net.pth", "rank0.jsonl", "rank1.jsonl", "summary.json"} <= set(left)
        assert json.loads(left["summary.json"].read_text())["world_size"] == 2
        # Root started it, but nothing ran as root.
        assert {path.stat().st_uid for path in left.values()} == {OWNER}

    def test_a_run_that_would_be_lost_says_so(self, podman, folder):
        mount = ("-v", f"{folder}/data:/home/app/data", "--user", f"{OWNER}:{OWNER}")
        done = run(*mount, IMAGE, *DATA.split(), "--epochs", "1")
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        at = next(i for i, line in enumerate(lines) if "lies inside this container" in line)
        assert "-v FOLDER_OF_YOURS:/home/app/runs" in lines[at]
        assert at < next(i for i, line in enumerate(lines) if "epoch" in line)

    def test_a_folder_of_another_user_is_refused_with_the_cure(self, podman, folder):
        mount = ("-v", f"{folder}/runs:/home/app/runs")
        done = run(*mount, IMAGE, "--data", "shapes")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == (
            "ddp-training: error: user 1000 cannot write /home/app/runs, which belongs to user "
            f"{OWNER}: add --user {OWNER}:{OWNER} to docker run\n"
        )
        cured = run(*mount, "--user", f"{OWNER}:{OWNER}", IMAGE, "plot", "runs/none")
        assert cured.returncode == 2 and "runs/none" in cured.stderr

    def test_arguments_reach_ddp_launch(self, podman):
        assert "usage: ddp-launch plot" in run(IMAGE, "plot", "--help").stdout
        refused = run(IMAGE, "--epochs", "0")
        assert refused.returncode == 2 and "--epochs" in refused.stderr

    def test_a_stopped_container_leaves_a_checkpoint(self, podman, folder):
        mounts = [f"-v{folder}/{name}:/home/app/{name}" for name in ("runs", "data")]
        flags = [*DATA.split(), "--epochs", "5000"]
        name = f"ddp-stop-{os.getpid()}"
        words = ["run", "--detach", "--name", name, "--user", "0:0", *mounts, IMAGE, *flags]
        containers.run(["podman", *words])
        try:
            wait_for_log(name, r"batch \d+/")
            containers.run(["podman", "stop", "--time", str(TIMEOUT_S), name])
            log = logs(name)
            state = containers.run(["podman", "inspect", "--format", "{{.State.ExitCode}}", name])
        finally:
            subprocess.run(["podman", "rm", "--force", "--time", "0", name], timeout=TIMEOUT_S)
        assert state.strip() == "143" and "stopped by signal 15" in log, log
        assert (folder / "runs" / "default" / "checkpoint.pt").exists()

    def test_lab_serves_the_course_to_whom_has_the_token(self, podman, tmp_path):
        [line] = docker_lines("8888:8888")
        port, name = free_port(), f"ddp-lab-{os.getpid()}"
        words = shlex.split(line.replace("8888:8888", f"127.0.0.1:{port}:8888"))
        words = [word for word in words if word not in ("--rm", "-it")]
        containers.run([*words[:2], "--detach", "--name", name, *words[2:]])
        try:
            wait_for_log(name, "token=")
            token = re.search(r"token=(\w+)", logs(name))[1]
            check_lab(port, token)
        finally:
            subprocess.run(["podman", "rm", "--force", "--time", "0", name], timeout=TIMEOUT_S)

    def test_a_notebook_runs_in_the_devcontainer(self, podman, tmp_path):
        """In the image that the Dockerfile makes, as the editor starts it: in a clone of the user's own. The
        first quarter of the notebook, with ranks and a picture."""
        config = ROOT / ".devcontainer" / "devcontainer.json"
        settings = json.loads(config.read_text())
        build = {name: (config.parent / path).resolve() for name, path in settings["build"].items()}
        assert build == {"dockerfile": ROOT / "Dockerfile", "context": ROOT}
        clone = tmp_path / "clone"
        clone.mkdir()
        for name in ("notebooks", "ddp_lib"):
            shutil.copytree(ROOT / name, clone / name)
        path = clone / "notebooks" / "02_samplers.ipynb"
        original = json.loads(path.read_text())
        original["cells"] = original["cells"][: len(original["cells"]) // 4]
        path.write_text(json.dumps(original))
        containers.run(["chown", "--recursive", "1000:1000", str(clone)])
        tmp_path.chmod(0o755)
        execute = "python -m nbconvert --to notebook --execute --inplace work/02_samplers.ipynb"
        command = f"{settings['postCreateCommand']} && {execute}"
        where = ("-v", f"{clone}:/workspaces/course", "-w", "/workspaces/course")
        shell = ("--user", settings["remoteUser"], "--entrypoint", "/bin/sh")
        done = run(*where, *shell, IMAGE, "-c", command)
        assert done.returncode == 0, done.stdout + done.stderr
        executed = json.loads((clone / "work" / "02_samplers.ipynb").read_text())
        counts, expected = ([c.get("execution_count") for c in n["cells"]] for n in (executed, original))
        assert counts == expected

    def test_compose_trains_and_serves_the_notebooks(self, podman, folder):
        port = free_port()
        (folder / "deploy").mkdir()
        text = COMPOSE.read_text().replace("127.0.0.1:8888", f"127.0.0.1:{port}")
        (folder / "deploy" / "compose.yaml").write_text(text)
        [line] = docker_lines("compose")
        assert line.startswith('TRAIN_FLAGS="--data shapes" docker compose ')
        assert line.endswith(" up")
        # One word: podman-compose fills the variable in after it has split the words, Docker before.
        line = line.replace("--data shapes", DATA.replace(" ", "="))
        line = line.replace("docker compose", f"podman-compose -p ddp{os.getpid()} --in-pod=false")
        base = line.removesuffix(" up")
        try:
            ended = bash(f"{line} --no-build", folder)
            print(ended.stdout, ended.stderr)
            assert ended.returncode == 0, ended.stdout + ended.stderr
            left = {path.name for path in (folder / "runs" / "default").iterdir()}
            assert {"cifar_net.pth", "rank0.jsonl", "rank1.jsonl"} <= left
            hosts = {
                json.loads(path.read_text().splitlines()[0])["host"]
                for path in (folder / "runs" / "default").glob("rank*.jsonl")
            }
            assert hosts == {"node0", "node1"}
            notebook = f"JUPYTER_TOKEN=secret {base} --profile notebook up --no-build -d notebook"
            started = bash(notebook, folder)
            assert started.returncode == 0, started.stdout + started.stderr
            wait_until_open(port)
            check_lab(port, "secret")
        finally:
            bash(f"{base} --profile notebook down --timeout 0", folder)


def bash(line: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, capture_output=True, text=True, timeout=2 * TIMEOUT_S
    )


def logs(name: str) -> str:
    done = subprocess.run(
        ["podman", "logs", name],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    )
    return done.stdout


def wait_for_log(name: str, pattern: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not re.search(pattern, text := logs(name)):
        assert time.monotonic() < deadline, text
        time.sleep(0.5)


def wait_until_open(port: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            ask(port, "api")
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.5)


def ask(port: int, path: str, token: str = "", post: bool = False) -> tuple[int, str]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/{path}",
        data=b"{}" if post else None,
        headers={"Authorization": f"token {token}"} if token else {},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=TIMEOUT_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as refused:
        return refused.code, ""


def check_lab(port: int, token: str) -> None:
    """The course is there, a kernel starts, and without the token there is nothing."""
    assert ask(port, "api/contents/notebooks")[0] == 403
    status, text = ask(port, "api/contents/notebooks", token)
    names = {entry["name"] for entry in json.loads(text)["content"]}
    ours = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert status == 200 and ours <= names
    assert ask(port, "api/kernels", token, post=True)[0] == 201
