"""deploy/kubernetes: strict schemas, and a rehearsal of the pods on machines of their own."""

import copy
import json
import re
from pathlib import Path

import pytest

from tests.lab import manifests, namespaces, readme
from tests.lab.job_controller import JobController
from tests.lab.machines import Lab
from tests.lab.manifests import Manifest, Pod
from tests.lab.program import Program
from tests.lab.project import ROOT

LATE_DNS = str(ROOT / "tests" / "lab" / "late_dns.py")
FOLDER = ROOT / "deploy" / "kubernetes"
FILES = sorted(FOLDER.glob("*.yaml"))
TIMEOUT_S = 600  # for what takes seconds on a free machine
SERVER_ADDRESS = "127.0.0.1"
DOMAIN = "default.svc.cluster.local"

lacks = namespaces.missing()


def on_machines(test):
    return pytest.mark.platforms(pytest.mark.skipif(bool(lacks), reason=lacks)(test))


def job() -> list[Manifest]:
    return manifests.load(FOLDER / "job.yaml")


def trainjob() -> Manifest:
    [manifest] = manifests.load(FOLDER / "trainjob.yaml")
    return manifest


# The files


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_manifest_is_valid(path):
    assert [fault for part in manifests.load(path) for fault in manifests.faults(part)] == []


def changed(manifest: object):
    """The manifest with one field renamed by a letter, or with one value of another type, each."""

    def paths_in(node: object, where: tuple = ()):
        children = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in children:
            yield (*where, key)
            if isinstance(value, dict | list):
                yield from paths_in(value, (*where, key))

    def copy_at(where: tuple):
        whole = copy.deepcopy(manifest)
        node = whole
        for key in where[:-1]:
            node = node[key]
        return whole, node

    free = {"labels", "selector", "requests", "limits", "annotations"}  # any name is right in these
    for where in paths_in(manifest):
        if free & set(map(str, where[:-1])):
            continue
        if isinstance(where[-1], str):
            whole, node = copy_at(where)
            node[where[-1] + "x"] = node.pop(where[-1])
            yield "/".join(map(str, where)) + " renamed", whole
        whole, node = copy_at(where)
        # A list for text, and text for all else.
        node[where[-1]] = "several" if not isinstance(node[where[-1]], str) else ["several"]
        yield "/".join(map(str, where)) + " of another type", whole


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_changed_field_or_type_is_seen(path):
    unseen = []
    for part in manifests.load(path):
        for what, whole in changed(part):
            try:
                seen = bool(manifests.faults(whole))
            except (KeyError, AttributeError):  # without a kind or a version there is no schema
                seen = True
            if not seen:
                unseen.append(f"{part['kind']}: {what}")
    assert unseen == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_pods_are_not_root_and_keep_the_run(path):
    """Of the Job, or of the TrainJob's patch: the same promises."""
    for part in manifests.load(path):
        for spec in pod_specs(part):
            [container] = spec["containers"]
            assert spec["securityContext"]["runAsNonRoot"] is True
            assert spec["securityContext"]["fsGroup"] == spec["securityContext"]["runAsUser"] > 0
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            volumes = {volume["name"]: volume for volume in spec["volumes"]}
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert set(mounts.values()) == set(volumes)
            claim = volumes[mounts["/home/app/runs"]]["persistentVolumeClaim"]["claimName"]
            assert claim in {m["metadata"]["name"] for m in job() if "Claim" in m["kind"]}
            assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"


def pod_specs(node: object) -> list[Manifest]:
    """Every part of a manifest that has containers."""
    if isinstance(node, list):
        return [spec for part in node for spec in pod_specs(part)]
    if not isinstance(node, dict):
        return []
    return [node] if "containers" in node else pod_specs(list(node.values()))


# The pods


def rehearse(pods: list[Pod], folder: Path, more: list[str]) -> list[Program]:
    """Runs each pod's command, with `more` words, on a machine of its name; names resolve late."""
    with Lab(len(pods), folder, names=[pod.name for pod in pods]) as lab:
        records = [
            f"{name}.{DOMAIN}={machine.address}"
            for pod, machine in zip(pods, lab.machines, strict=True)
            for name in pod.names
        ]
        resolv = folder / "resolv.conf"
        resolv.write_text(
            f"nameserver {SERVER_ADDRESS}\nsearch {DOMAIN} svc.cluster.local\noptions ndots:5\n"
        )
        programs, servers = [], []
        for pod, machine in zip(pods, lab.machines, strict=True):
            machine.write_hosts({pod.name: machine.address})  # as the kubelet does
            machine.run(["mount", "--bind", str(resolv), "/etc/resolv.conf"])
            servers.append(machine.start(["python", LATE_DNS, "3", *records]))
            servers[-1].wait_for("serves", TIMEOUT_S)
        for pod, machine in zip(pods, lab.machines, strict=True):
            programs.append(machine.start([*pod.command, *more], **pod.environment))
        for program in programs:
            assert program.wait(TIMEOUT_S) == 0, "\n".join(p.output for p in programs)
        assert any("late" in server.output for server in servers)
        return programs


REHEARSALS = {
    "job": lambda: manifests.pods_of_job(job()),
    "trainjob": lambda: manifests.pods_of_trainjob(trainjob()),
}


@pytest.fixture
def shorter(images_folder: Path, shared_cache: str) -> list[str]:
    """Flags for a run of seconds."""
    return f"--data {images_folder} --epochs 1 --data-dir {shared_cache}".split()


@on_machines
@pytest.mark.parametrize("name", REHEARSALS)
def test_the_pods_train_together(name, tmp_path, shorter):
    programs = rehearse(REHEARSALS[name](), tmp_path, shorter)
    assert len(programs) == 2 and "2 rank(s)" in programs[0].output + programs[1].output
    [summary] = tmp_path.glob("machine*/runs/*/summary.json")
    assert json.loads(summary.read_text())["world_size"] == 2
    # On the volume, which is mounted at the folder "runs" of the image's working directory.
    assert summary.with_name("cifar_net.pth").exists()


@on_machines
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("command", ["ddp-lunch"]),
        ("args", ["train", "--dta", "shapes"]),
        ("env", [{"name": "RANK", "value": "0"}]),
    ],
)
def test_a_wrong_command_is_seen(field, value, tmp_path, shorter):
    wrong = job()
    wrong[2]["spec"]["template"]["spec"]["containers"][0][field] = value
    with pytest.raises(AssertionError, match=r"ddp-lunch|--dta|WORLD_SIZE"):
        rehearse(manifests.pods_of_job(wrong), tmp_path, shorter)


# The Job, when pods fail


def job_of(pods: int) -> list[Manifest]:
    """The Job with so many pods, as its file says how to."""
    parts = job()
    spec = parts[2]["spec"]
    spec["completions"] = spec["parallelism"] = pods
    [container] = spec["template"]["spec"]["containers"]
    for variable in container["env"]:
        if variable["name"] == "WORLD_SIZE":
            variable["value"] = str(pods)
    return parts


class Pods:
    """The pods of a Job, each on a machine of its own; `more` words and variables of each start."""

    def __init__(self, lab: Lab, parts: list[Manifest], more: list[str]) -> None:
        self.machines, self.more = lab.machines, more
        self.pods = manifests.pods_of_job(parts)
        self.starts = [0] * len(self.pods)
        names = {
            name: m.address for pod, m in zip(self.pods, lab.machines, strict=True) for name in pod.names
        }
        for machine in lab.machines:
            machine.write_hosts(names)

    def start(self, index: int, *before: str, **environment: str) -> Program:
        pod = self.pods[index]
        self.starts[index] += 1
        run_dir = ["--run-dir", str(self.machines[index].folder / "run")]
        command = [*before, *pod.command, *self.more, *run_dir]
        return self.machines[index].start(command, **{**pod.environment, **environment})


LATE = "import os, sys, time\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.05)\n"
LATE += "os.execv(sys.executable, [sys.executable, '-m', 'ddp_lib.launch', *sys.argv[3:]])"


@on_machines
def test_a_pod_that_comes_late_joins_and_costs_nothing_of_the_limit(tmp_path, shorter):
    """The other has given up once until then."""
    parts, there = job_of(2), tmp_path / "image loaded"
    with Lab(2, tmp_path) as lab:
        pods = Pods(lab, parts, [*shorter, "--join-timeout-s", "2"])

        def start(index: int) -> Program:
            if index == 0 and pods.starts[0] == 1:
                there.touch()
            return pods.start(index, *(["python", "-c", LATE, str(there)] if index else []))

        controller = JobController(parts[2], start)
        assert controller.run(TIMEOUT_S) == "Complete"
    assert controller.counted == 0 and controller.ignored >= 1


@on_machines
def test_a_wrong_flag_ends_the_job_at_once(tmp_path, shorter):
    parts = job_of(2)
    with Lab(2, tmp_path) as lab:
        pods = Pods(lab, parts, [*shorter, "--epochs", "0"])
        controller = JobController(parts[2], pods.start)
        assert controller.run(TIMEOUT_S) == "Failed"
    assert (controller.counted, controller.ignored, sum(pods.starts)) == (0, 0, 2)


@on_machines
def test_a_crash_counts_once_however_many_pods_it_ends(tmp_path, shorter):
    parts = job_of(2)
    more = [*shorter, "--model", "tests.lab.models:Plain", "--global-batch-size", "210"]
    with Lab(2, tmp_path) as lab:
        pods = Pods(lab, parts, more)

        def start(index: int) -> Program:
            dies = {"DIE_IN_STEP": "1"} if index == 1 and pods.starts[1] == 0 else {}
            return pods.start(index, **dies)

        controller = JobController(parts[2], start)
        assert controller.run(TIMEOUT_S) == "Complete"
    assert (controller.counted, controller.ignored) == (1, 1)


def test_a_pod_without_its_service_has_no_name():
    for field, value in (("clusterIP", "10.0.0.1"), ("selector", {"job-name": "another"})):
        wrong = job()
        wrong[0]["spec"][field] = value
        assert [pod.names for pod in manifests.pods_of_job(wrong)] == [[], []]


# README


def test_readme_applies_these_files():
    named = re.findall(r"kubectl apply --filename (\S+)", "\n".join(readme.commands("By Kubernetes")))
    assert sorted(named) == sorted(f"deploy/kubernetes/{path.name}" for path in FILES)
