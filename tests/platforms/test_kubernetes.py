"""deploy/kubernetes: strict schemas, and a rehearsal of the pods on machines of their own."""

import copy
import json
import re
from pathlib import Path

import pytest

from tests.lab import manifests, namespaces, readme
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


def test_a_pod_without_its_service_has_no_name():
    for field, value in (("clusterIP", "10.0.0.1"), ("selector", {"job-name": "another"})):
        wrong = job()
        wrong[0]["spec"][field] = value
        assert [pod.names for pod in manifests.pods_of_job(wrong)] == [[], []]


# README


def test_readme_applies_these_files():
    named = re.findall(r"kubectl apply --filename (\S+)", "\n".join(readme.commands("By Kubernetes")))
    assert sorted(named) == sorted(f"deploy/kubernetes/{path.name}" for path in FILES)
