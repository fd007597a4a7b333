"""Creates virtual environments for Python programs in the cache, if they are missing or their requirements have changed."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from . import layout, processes, tools
from .terminal import Problem, Step


def environment(name: str, requirements: Path, least: tuple, otherwise: str) -> Path:
    """Returns the folder of the environment. `least` is the minimum Python version; `otherwise` is appended to the advice."""
    home = layout.tools() / name
    if not _is_current(home, requirements):
        if sys.version_info < least:
            wanted = ".".join(map(str, least))
            raise Problem(f"{name} needs Python {wanted} or newer", f"Run ./dev with a newer python3{otherwise}.")
        tools.install_system([tools.Need("python3-venv", "Python's venv", _has_venv)])
        with tools.installing():
            if not _is_current(home, requirements):
                _install(name, home, requirements)
    return home


def _is_current(home: Path, requirements: Path) -> bool:
    installed = home / "requirements.txt"
    return installed.exists() and installed.read_bytes() == requirements.read_bytes()


def _has_venv() -> bool:
    return subprocess.run([sys.executable, "-c", "import ensurepip, venv"], capture_output=True).returncode == 0


def _install(name: str, home: Path, requirements: Path) -> None:
    # A virtual environment contains its own path and cannot be moved. The requirements file is written last and marks
    # the environment as complete.
    shutil.rmtree(home, ignore_errors=True)
    log = layout.LOGS / f"{name}.log"
    with Step(f"installing {name}") as step:
        processes.run(step, [sys.executable, "-m", "venv", home], log, cwd=layout.ROOT)
        pip = [home / "bin" / "pip", "install", "--disable-pip-version-check", "-r", requirements]
        processes.run(step, pip, log, _progress, cwd=layout.ROOT)
        shutil.copyfile(requirements, home / "requirements.txt")
        step.done()


def _progress(line: str) -> str:
    """Extracts text such as `Downloading x` from pip's output."""
    match = re.match(r"\s*(Collecting|Downloading|Building|Installing)\b[^(]*", line)
    return match[0].strip()[:60] if match else ""
