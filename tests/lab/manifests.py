"""Kubernetes' manifests: checked against the real schemas, and turned into what their pods would run."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

Manifest = dict[str, Any]


def load(path: Path) -> list[Manifest]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def faults(manifest: Manifest) -> list[str]:
    """What a cluster would refuse, or silently leave out."""
    if manifest["apiVersion"].startswith("trainer.kubeflow.org/"):
        try:
            read = TrainerV1alpha1TrainJob.from_dict(manifest)
        except Exception as error:
            return [str(error)]
        # The model leaves out what it does not know.
        return [*_differences(manifest, read.to_dict())]
    try:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    except Exception as error:
        return [str(error).splitlines()[0]]
    return []


def _differences(given: Any, read: Any, where: str = "") -> Iterator[str]:
    if isinstance(given, dict) and isinstance(read, dict):
        for key, value in given.items():
            yield from _differences(value, read.get(key), f"{where}.{key}")
    elif isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        for number, (mine, theirs) in enumerate(zip(given, read, strict=True)):
            yield from _differences(mine, theirs, f"{where}[{number}]")
    elif given != read or type(given) is not type(read):
        yield f"{where}: {given!r} -> {read!r}"


@dataclass(frozen=True)
class Pod:
    """What runs in a pod, and by which names the others find it."""

    name: str
    names: list[str]
    command: list[str]
    environment: dict[str, str]


def pods_of_job(manifests: list[Manifest]) -> list[Pod]:
    """The pods of the Job among them; named only where a headless Service selects them."""
    job = next(part for part in manifests if part["kind"] == "Job")
    spec, pod, name = job["spec"], job["spec"]["template"]["spec"], job["metadata"]["name"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    [container] = pod["containers"]
    labels = {**job["spec"]["template"].get("metadata", {}).get("labels", {})}
    labels |= {"job-name": name, "batch.kubernetes.io/job-name": name}
    services = [
        part["metadata"]["name"]
        for part in manifests
        if part["kind"] == "Service"
        and part["spec"].get("clusterIP") == "None"
        and part["spec"]["selector"].items() <= labels.items()
    ]
    pods = []
    for index in range(spec["completions"]):
        hostname = f"{name}-{index}"
        names = [f"{hostname}.{pod['subdomain']}"] if pod.get("subdomain") in services else []
        variables = _environment(container, container["resources"], index)
        pods.append(Pod(hostname, names, _command(container, variables), variables))
    return pods


def pods_of_trainjob(job: Manifest) -> list[Pod]:
    """The pods that Kubeflow Trainer's runtime torch-distributed makes; the variables PET_* and the
    names are those of its plugin torch (pkg/runtime/framework/plugins/torch)."""
    name, trainer = job["metadata"]["name"], job["spec"]["trainer"]
    pods = []
    for index in range(trainer["numNodes"]):
        hostname = f"{name}-node-0-{index}"
        variables = {
            **_environment(trainer, trainer["resourcesPerNode"], index),
            "PET_NNODES": str(trainer["numNodes"]),
            "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
            "PET_NODE_RANK": str(index),
            "PET_MASTER_ADDR": f"{name}-node-0-0.{name}",
            "PET_MASTER_PORT": "29500",
        }
        command = _command(trainer, variables)
        pods.append(Pod(hostname, [f"{hostname}.{name}"], command, variables))
    return pods


def _environment(container: Manifest, resources: Manifest, index: int) -> dict[str, str]:
    def value(source: Manifest) -> str:
        match source:
            case {"fieldRef": {"fieldPath": path}}:
                name = "batch.kubernetes.io/job-completion-index"
                return {f"metadata.annotations['{name}']": str(index)}[path]
            case {"resourceFieldRef": {"resource": "limits.cpu"}}:
                return str(resources["limits"]["cpu"])
        raise KeyError(source)

    return {
        part["name"]: part["value"] if "value" in part else value(part["valueFrom"])
        for part in container.get("env", [])
    }


def _command(container: Manifest, variables: dict[str, str]) -> list[str]:
    """command and args, with $(NAME) filled in as the kubelet does: unknown names stay."""
    words = [*container["command"], *container.get("args", [])]
    return [re.sub(r"\$\((\w+)\)", lambda m: variables.get(m[1], m[0]), str(word)) for word in words]
