"""Where things lie."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Everything that a stack keeps: data, logs, the first password. The setting is for a second stack beside the first.
DOT = Path(os.environ.get("VMWATCH_DEV_DIR") or ROOT / ".dev").absolute()
LOGS = DOT / "logs"
PASSWORD = DOT / "admin-password"


def cache() -> Path:
    """What is installed or built once for all checkouts of this user."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("VMWATCH_CACHE") or Path(base) / "vmwatch")


def tools() -> Path:
    return cache() / "tools"


def short(path) -> str:
    """A path as a person at the top of the checkout would write it."""
    try:
        return str(Path(path).relative_to(ROOT))
    except ValueError:
        return str(path)
