"""A rendered Kustomize overlay of deploy/kubernetes, with functions to find its objects."""

import os
import re
import subprocess
from typing import Iterator, List

import yaml

from . import sources

# Labels and ports of the pods that are created by other charts and operators (NATS, MongoDB).
FOREIGN_PODS = {
    "nats": ({"app.kubernetes.io/name": "nats"}, {4222, 6222, 7777, 8443}),
    "mongodb": ({"app": "vmwatch-mongodb-svc"}, {27017}),
}


class Overlay:
    """The Kubernetes objects of a rendered overlay."""

    def __init__(self, name: str):
        self.name = name
        command = [os.environ["VMWATCH_KUBECTL"], "kustomize", sources.ROOT / "deploy" / "kubernetes" / "overlays" / name]
        rendered = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        self.objects = list(yaml.safe_load_all(rendered))

    def all(self, kind: str) -> List[dict]:
        return [item for item in self.objects if item["kind"] == kind]

    def names(self, kind: str) -> List[str]:
        return [item["metadata"]["name"] for item in self.all(kind)]

    def deployment(self, name: str) -> dict:
        return next(item for item in self.all("Deployment") if item["metadata"]["name"] == name)

    def selected(self, selector: dict) -> List[dict]:
        return [item for item in self.all("Deployment") if matches(selector, pod(item)["metadata"]["labels"])]

    def drain_seconds(self, deployment: dict) -> int:
        settings = dict(environment(self, deployment))
        return int(re.fullmatch(r"(\d+)s", settings["VMWATCH_DRAIN_DEADLINE"])[1])


def pod(deployment: dict) -> dict:
    return deployment["spec"]["template"]


def container(deployment: dict) -> dict:
    (only,) = pod(deployment)["spec"]["containers"]
    return only


def program(deployment: dict) -> str:
    return deployment["metadata"]["name"].removeprefix("vmwatch-")


def ports(deployment: dict) -> dict:
    return {port["name"]: port["containerPort"] for port in container(deployment)["ports"]}


def matches(selector: dict, labels: dict) -> bool:
    """Whether a label selector matches the labels. Supports only the operators that the overlays use."""
    equal = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    expressions = selector.get("matchExpressions", [])
    return equal and all(rule["operator"] == "In" and labels.get(rule["key"]) in rule["values"] for rule in expressions)


def foreign(selector: dict) -> List[str]:
    """Returns the servers of other charts and operators whose pods the selector matches."""
    return [name for name, (labels, _) in FOREIGN_PODS.items() if matches(selector, labels)]


def environment(overlay: Overlay, deployment: dict) -> Iterator[tuple]:
    """Returns each environment variable with its value, or with `None` if the value comes from a reference."""
    maps = {item["metadata"]["name"]: item["data"] for item in overlay.all("ConfigMap")}
    for source in container(deployment).get("envFrom", []):
        yield from maps.get(source["configMapRef"]["name"], {}).items()
    for variable in container(deployment).get("env", []):
        yield variable["name"], variable.get("value")


def manifest(name: str) -> dict:
    """Returns the text of a file in deploy/kubernetes."""
    return yaml.safe_load((sources.ROOT / "deploy" / "kubernetes" / name).read_text())
