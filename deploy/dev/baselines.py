"""Installs the Python and Node.js programs that `bench` compares vmwatch with, into the cache."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from . import layout, processes, tools, venv
from .terminal import Problem, Step

HOME = layout.ROOT / "bench" / "baselines"
# The versions of all packages are pinned, so results are comparable.
REQUIREMENTS = HOME / "wsgi" / "requirements.txt"
PACKAGES = ("package.json", "package-lock.json")
# The minimum Python version that gunicorn supports.
PYTHON_LEAST = (3, 10)
# The minimum Node.js version that the MongoDB driver supports.
NODE_LEAST = 20
# Node.js as a package from PyPI, used if Node.js in PATH is missing or too old.
NODE_WHEEL = HOME / "node" / "requirements.txt"


def environment() -> dict:
    """Returns the environment variables with the paths of these programs for the `bench` crate. Variables already set take precedence."""
    found = {
        "VMWATCH_BENCH_GUNICORN": _gunicorn,
        "VMWATCH_BENCH_NODE": _node,
        "VMWATCH_BENCH_NODE_MODULES": lambda: str(_modules()),
    }
    return {name: os.environ.get(name) or find() for name, find in found.items()}


def _gunicorn() -> str:
    otherwise = ", or set VMWATCH_BENCH_GUNICORN to a gunicorn that has pymongo"
    return str(venv.environment("baseline-wsgi", REQUIREMENTS, PYTHON_LEAST, otherwise) / "bin" / "gunicorn")


def _node() -> str:
    on_path = shutil.which("node")
    if on_path and _version(on_path) >= NODE_LEAST:
        return on_path
    otherwise = f", or put Node {NODE_LEAST} or newer in PATH"
    return str(venv.environment("node", NODE_WHEEL, PYTHON_LEAST, otherwise) / "bin" / "node")


def _version(node: str) -> int:
    output = subprocess.run([node, "--version"], capture_output=True, text=True).stdout
    match = re.match(r"v(\d+)\.", output)
    return int(match[1]) if match else 0


def _modules() -> Path:
    """Returns the folder with the packages of package-lock.json, which are installed if missing or outdated."""
    home = layout.tools() / "baseline-node"
    node = Path(_node())
    if all(_is_copy(HOME / "node" / name, home / name) for name in PACKAGES):
        return home / "node_modules"
    npm = node.with_name("npm") if node.with_name("npm").exists() else shutil.which("npm")
    if not npm:
        raise Problem("npm is not in PATH", "Install npm, or set VMWATCH_BENCH_NODE_MODULES to the installed packages.")
    with tools.installing(), Step("installing the packages of the Node.js program for comparison") as step:
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
