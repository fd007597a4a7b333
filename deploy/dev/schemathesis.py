"""schemathesis, which tries the REST API against its own document: in an environment of its own, in the cache."""

import shutil
import subprocess
import sys
from pathlib import Path

from . import layout, processes, tools
from .terminal import Problem, Step

# Every package with its version, so that the same checks run everywhere.
REQUIREMENTS = layout.ROOT / "tests" / "schemathesis" / "requirements.txt"
# What schemathesis asks for.
LEAST = (3, 10)


def program() -> Path:
    """Its program, installed where it is missing or the requirements have changed."""
    home = layout.tools() / "schemathesis"
    if not _is_current(home):
        if sys.version_info < LEAST:
            least = ".".join(map(str, LEAST))
            raise Problem(
                f"schemathesis needs Python {least} or newer",
                "Run ./dev with a newer python3, or name a schemathesis by VMWATCH_TEST_SCHEMATHESIS.",
            )
        tools.install_system([tools.Need("python3-venv", "Python's venv", _has_venv)])
        with tools.installing():
            if not _is_current(home):
                _install(home)
    return home / "bin" / "schemathesis"


def _is_current(home: Path) -> bool:
    installed = home / "requirements.txt"
    return installed.exists() and installed.read_bytes() == REQUIREMENTS.read_bytes()


def _has_venv() -> bool:
    return subprocess.run([sys.executable, "-c", "import ensurepip, venv"], capture_output=True).returncode == 0


def _install(home: Path) -> None:
    # A venv names its own place: it cannot be moved, so that the requirements are put there last.
    shutil.rmtree(home, ignore_errors=True)
    log = layout.LOGS / "schemathesis.log"
    with Step("installing schemathesis") as step:
        processes.run(step, [sys.executable, "-m", "venv", home], log, cwd=layout.ROOT)
        pip = [home / "bin" / "pip", "install", "--disable-pip-version-check", "-r", REQUIREMENTS]
        processes.run(step, pip, log, cwd=layout.ROOT)
        shutil.copyfile(REQUIREMENTS, home / "requirements.txt")
        step.done()
