"""Reads settings, ports, metrics and NATS names from the source code of the programs, so the rules need no copy of
them."""

import functools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict, Set

ROOT = Path(__file__).resolve().parents[2]
CRATES = {
    "gateway": "gateway", "auth": "auth-svc", "metrics": "metrics-svc", "lifecycle": "lifecycle-svc", "alert": "alert-svc",
    "agent": "agent",
}


def text_of(crate: str) -> str:
    """Returns the source code of a crate, or of all crates in a folder."""
    paths = [*(ROOT / crate).glob("src/**/*.rs"), *(ROOT / crate).glob("*/src/**/*.rs")]
    return "\n".join(path.read_text() for path in sorted(paths))


def settings(program: str) -> Set[str]:
    """Returns the environment variables that the program and the shared crates read."""
    return set(re.findall(r'"(VMWATCH_[A-Z0-9_]+)"', text_of(CRATES[program]) + text_of("shared")))


def health_port(program: str) -> int:
    """Returns the program's default health port, from a line like `const HEALTH: &str = "127.0.0.1:9080"`."""
    return int(re.search(r'const HEALTH: &str = "127\.0\.0\.1:(\d+)"', text_of(CRATES[program]))[1])


@functools.lru_cache(maxsize=None)
def metrics() -> Dict[str, Set[str]]:
    """Returns the names of all counters, gauges and histograms, with their labels."""
    found = {}
    for crate in [*CRATES.values(), "shared"]:
        for name, rest in re.findall(r'(?:counter|gauge|histogram)!\(\s*"([a-z0-9_]+)"((?:[^;])*?)\)\s*\.', text_of(crate)):
            found.setdefault(name, set()).update(re.findall(r'"(\w+)"\s*=>', rest))
    return found


def vm_metrics() -> Dict[str, Set[str]]:
    """Returns the names of the metrics of VMs that the gateway serves at /api/v1/metrics, with the labels that they may have."""
    folder = ROOT / "gateway" / "src" / "rest" / "open_metrics"
    code = (folder / "families.rs").read_text() + (folder / "fleet.rs").read_text()
    names = re.findall(r'(?:gauge|ratio|bytes_per_second|number)\(\s*"(vmwatch_[a-z0-9_]+)"', code)
    labels = {"instance_id", "name", "hypervisor", *re.findall(r'(?:push_label\(&mut labels,|label\()\s*"(\w+)"', code)}
    return {("vmwatch_vm_info" if name == "vmwatch_vm" else name): labels for name in names}


def owners() -> Set[str]:
    """Returns the programs that own JetStream streams, which are those with the command `setup`."""
    return {name for name, crate in CRATES.items() if "SetupArguments" in text_of(crate)}


def constant(crate: str, name: str) -> str:
    return re.search(rf'const {name}: &str = "([^"]+)"', text_of(crate))[1]


def secrets() -> Dict[str, Set[str]]:
    """Returns the names and keys of the Secrets that `deploy/secrets kubernetes` prints; runs it in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "deploy" / "secrets", "--store", folder, "kubernetes"]
        printed = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {item["metadata"]["name"]: set(item["stringData"]) for item in printed["items"]}


def image_ports(program: str) -> Set[int]:
    """Returns the ports that the program's image exposes, according to deploy/Dockerfile."""
    stage = re.search(rf"\nFROM scratch AS {program}\n(.*?)ENTRYPOINT", (ROOT / "deploy" / "Dockerfile").read_text(), re.S)[1]
    return {int(port) for line in re.findall(r"EXPOSE (.*)", stage) for port in line.split()}
