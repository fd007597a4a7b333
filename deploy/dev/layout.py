"""Paths of files and folders."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# The files of a stack: data, logs, the first password. The setting allows a second stack next to the first.
DOT = Path(os.environ.get("VMWATCH_DEV_DIR") or ROOT / ".dev").absolute()
LOGS = DOT / "logs"
PASSWORD = DOT / "admin-password"


def cache() -> Path:
    """The folder for files shared by all checkouts of this user."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("VMWATCH_CACHE") or Path(base) / "vmwatch")


def tools() -> Path:
    return cache() / "tools"


def short(path) -> str:
    """A path relative to the top of the checkout, if it is inside."""
    try:
        return str(Path(path).relative_to(ROOT))
    except ValueError:
        return str(path)
