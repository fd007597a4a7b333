"""The build: the same command for `up` and `test`, so that neither undoes the other's work."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

from . import layout, processes
from .terminal import Problem, Step

# Of the dev profile: it is what the tests run too, and a first start is not held up by a whole-program optimisation.
PROFILE_FOLDER = "debug"


def environment():
    """Cargo's own progress bar, for its count of crates, also into a pipe."""
    return {**os.environ, "CARGO_TERM_PROGRESS_WHEN": "always", "CARGO_TERM_PROGRESS_WIDTH": "100"}


def progress(line: str) -> str:
    """`123/456 tokio` out of cargo's progress bar, or what it does out of its other lines."""
    bar = re.search(r"Building \[[^\]]*\] (\d+/\d+)(?:: (.*))?", line)
    if bar:
        return f"{bar[1]} {(bar[2] or '').partition(',')[0]}".strip()
    match = re.match(r"(Downloading|Downloaded|Updating|Blocking|Checking|Compiling)\b.*", line)
    return match[0] if match else ""


def check() -> None:
    """Cargo must be there, and new enough for the workspace."""
    if not shutil.which("cargo"):
        raise Problem("cargo is not in PATH", "Install Rust by rustup, or put its bin folder in PATH.")
    needed = re.search(r'(?m)^rust-version = "([\d.]+)"', (layout.ROOT / "Cargo.toml").read_text())[1]
    said = subprocess.run(["cargo", "--version"], capture_output=True, text=True, cwd=layout.ROOT).stdout
    found = re.search(r"(\d+\.\d+)", said)
    if not found or _numbers(found[1]) < _numbers(needed):
        here = said.strip() or "none"
        raise Problem(f"Rust {needed} or newer is needed; here is {here}", "Run: rustup update stable")


def _numbers(version: str):
    return [int(part) for part in version.split(".")]


def target_folder(profile: str = PROFILE_FOLDER) -> Path:
    """Where binaries come to lie, whatever CARGO_TARGET_DIR or a cargo configuration says."""
    said = subprocess.run(
        ["cargo", "metadata", "--no-deps", "--format-version", "1"],
        capture_output=True, text=True, cwd=layout.ROOT,
    )
    if said.returncode != 0:
        raise Problem("cargo cannot read the workspace", said.stderr.strip())
    return Path(json.loads(said.stdout)["target_directory"]) / profile


def build(title: str = "building") -> Path:
    """Builds all binaries; the folder that they are in."""
    with Step(title) as step:
        command = ["cargo", "build", "--workspace", "--bins"]
        processes.run(step, command, layout.LOGS / "build.log", progress, env=environment(), cwd=layout.ROOT)
        step.done()
    return target_folder()
