"""Builds the programs with cargo. `up` and `test` use the same command, so neither invalidates the other's build."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

from . import layout, processes
from .terminal import Problem, Step

# The dev profile is used because the tests use it as well, and because the first build then takes less time.
PROFILE_FOLDER = "debug"


def environment():
    """Returns the environment that makes cargo write its progress bar even to a pipe, so progress can be shown."""
    return {**os.environ, "CARGO_TERM_PROGRESS_WHEN": "always", "CARGO_TERM_PROGRESS_WIDTH": "100"}


def progress(line: str) -> str:
    """Extracts `123/456 tokio` from cargo's progress bar, or the activity from its other lines."""
    bar = re.search(r"Building \[[^\]]*\] (\d+/\d+)(?:: (.*))?", line)
    if bar:
        return f"{bar[1]} {(bar[2] or '').partition(',')[0]}".strip()
    match = re.match(r"(Downloading|Downloaded|Updating|Blocking|Checking|Compiling)\b.*", line)
    return match[0] if match else ""


def check() -> None:
    """Raises a Problem if cargo is missing or older than the workspace requires."""
    if not shutil.which("cargo"):
        raise Problem("cargo is not in PATH", "Install Rust with rustup, or add its bin folder to PATH.")
    needed = re.search(r'(?m)^rust-version = "([\d.]+)"', (layout.ROOT / "Cargo.toml").read_text())[1]
    output = subprocess.run(["cargo", "--version"], capture_output=True, text=True, cwd=layout.ROOT).stdout
    found = re.search(r"(\d+\.\d+)", output)
    if not found or _numbers(found[1]) < _numbers(needed):
        installed = output.strip() or "none"
        raise Problem(f"Rust {needed} or newer is required, but the installed version is {installed}", "Run: rustup update stable")


def add_target(target: str) -> None:
    """Adds Rust's standard library for another target if it is missing."""
    query = ["rustc", "--print", "target-libdir", "--target", target]
    folder = subprocess.run(query, capture_output=True, text=True, cwd=layout.ROOT).stdout.strip()
    if folder and Path(folder).exists():
        return
    if not shutil.which("rustup"):
        raise Problem(f"Rust's standard library for {target} is missing", "Install it from the same source as your Rust toolchain.")
    with Step(f"adding {target} to the Rust toolchain") as step:
        processes.run(step, ["rustup", "target", "add", target], layout.LOGS / "rustup.log", cwd=layout.ROOT)
        step.done()


def _numbers(version: str):
    return [int(part) for part in version.split(".")]


def target_folder(profile: str = PROFILE_FOLDER) -> Path:
    """Returns the folder with the built binaries; CARGO_TARGET_DIR and cargo's configuration can change it."""
    metadata = subprocess.run(
        ["cargo", "metadata", "--no-deps", "--format-version", "1"],
        capture_output=True, text=True, cwd=layout.ROOT,
    )
    if metadata.returncode != 0:
        raise Problem("cargo cannot read the workspace", metadata.stderr.strip())
    return Path(json.loads(metadata.stdout)["target_directory"]) / profile


def build(title: str = "building") -> Path:
    """Builds all binaries and returns their folder."""
    with Step(title) as step:
        command = ["cargo", "build", "--workspace", "--bins"]
        processes.run(step, command, layout.LOGS / "build.log", progress, env=environment(), cwd=layout.ROOT)
        step.done()
    return target_folder()
