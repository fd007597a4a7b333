"""The paths of files and folders that ./dev uses."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# The folder with a stack's data, logs and initial password. With a different VMWATCH_DEV_DIR, a second stack can run at
# the same time.
DOT = Path(os.environ.get("VMWATCH_DEV_DIR") or ROOT / ".dev").absolute()
LOGS = DOT / "logs"
PASSWORD = DOT / "admin-password"


def cache() -> Path:
    """Returns the cache folder, which all checkouts of this user share."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("VMWATCH_CACHE") or Path(base) / "vmwatch")


def tools() -> Path:
    return cache() / "tools"


def short(path) -> str:
    """Returns the path relative to the checkout if it is inside, otherwise the absolute path."""
    try:
        return str(Path(path).relative_to(ROOT))
    except ValueError:
        return str(path)
