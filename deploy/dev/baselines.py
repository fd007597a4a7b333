"""What `bench` compares with in other languages: Python and Node with their packages, in the cache."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from . import layout, processes, tools, venv
from .terminal import Problem, Step

HOME = layout.ROOT / "bench" / "baselines"
# Every package with its version, so that the same is compared everywhere.
REQUIREMENTS = HOME / "wsgi" / "requirements.txt"
PACKAGES = ("package.json", "package-lock.json")
# What gunicorn asks for.
PYTHON_LEAST = (3, 10)
# What the driver for MongoDB asks for.
NODE_LEAST = 20
# Node out of PyPI, where PATH has none that is new enough.
NODE_WHEEL = HOME / "node" / "requirements.txt"


def environment() -> dict:
    """Where the programs are, for the crate `bench`, where the caller has not said so."""
    found = {
        "VMWATCH_BENCH_GUNICORN": _gunicorn,
        "VMWATCH_BENCH_NODE": _node,
        "VMWATCH_BENCH_NODE_MODULES": lambda: str(_modules()),
    }
    return {name: os.environ.get(name) or find() for name, find in found.items()}


def _gunicorn() -> str:
    otherwise = ", or name a gunicorn with pymongo by VMWATCH_BENCH_GUNICORN"
    return str(venv.environment("baseline-wsgi", REQUIREMENTS, PYTHON_LEAST, otherwise) / "bin" / "gunicorn")


def _node() -> str:
    on_path = shutil.which("node")
    if on_path and _version(on_path) >= NODE_LEAST:
        return on_path
    otherwise = f", or put Node {NODE_LEAST} or newer in PATH"
    return str(venv.environment("node", NODE_WHEEL, PYTHON_LEAST, otherwise) / "bin" / "node")


def _version(node: str) -> int:
    said = subprocess.run([node, "--version"], capture_output=True, text=True).stdout
    match = re.match(r"v(\d+)\.", said)
    return int(match[1]) if match else 0


def _modules() -> Path:
    """The packages that package-lock.json names."""
    home = layout.tools() / "baseline-node"
    node = Path(_node())
    if all(_is_copy(HOME / "node" / name, home / name) for name in PACKAGES):
        return home / "node_modules"
    npm = node.with_name("npm") if node.with_name("npm").exists() else shutil.which("npm")
    if not npm:
        raise Problem("npm is not in PATH", "Install it beside Node, or name the packages by VMWATCH_BENCH_NODE_MODULES.")
    with tools.installing(), Step("installing what Node needs") as step:
        shutil.rmtree(home, ignore_errors=True)
        partial = home.with_name(f".{home.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name in PACKAGES:
            shutil.copy(HOME / "node" / name, partial)
        command = [npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
        path = f"{node.parent}{os.pathsep}{os.environ.get('PATH', '')}"
        log = layout.LOGS / "baseline-node.log"
        processes.run(step, command, log, env={**os.environ, "PATH": path}, cwd=partial)
        partial.rename(home)
        step.done()
    return home / "node_modules"


def _is_copy(file: Path, copy: Path) -> bool:
    return copy.exists() and copy.read_bytes() == file.read_bytes()
