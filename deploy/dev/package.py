"""`package`: builds the agent's packages for Debian and for distributions that use RPM, and the command line's for Debian.

agent/Cargo.toml and cli/Cargo.toml list their files, which are in deploy/package.
"""

import functools
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from . import cargo, guest, layout, processes, tools
from .terminal import EX_USAGE, Problem, Step, say

# The versions of the tools that write the packages.
CARGO_DEB = ("cargo-deb", "3.8.0")
CARGO_GENERATE_RPM = ("cargo-generate-rpm", "0.21.1")
# The target and profile of the programs in the packages.
BUILT = ["--target", guest.TARGET, "--profile", guest.PROFILE]
# The completion scripts of the command line, by shell, as cli/Cargo.toml names them.
COMPLETIONS = {"bash": "vmwatch.bash", "zsh": "_vmwatch", "fish": "vmwatch.fish"}
# What the tests of the packages need.
TEST_NEEDS = [
    tools.Need(package, what, functools.partial(shutil.which, program, path=tools.ADMIN_PATH))
    for package, what, program in [
        ("shellcheck", "shellcheck, which checks the packages' scripts", "shellcheck"),
        ("rpm", "rpm, which reads the .rpm", "rpm"),
        ("debootstrap", "debootstrap, which makes a tree of Debian", "debootstrap"),
        ("systemd-container", "systemd-nspawn, in which the .deb is installed", "systemd-nspawn"),
    ]
]


@dataclass(frozen=True)
class Packages:
    """The paths of the agent's packages."""

    deb: Path
    rpm: Path


def package(arguments) -> int:
    """Builds the packages for this machine's architecture and prints their paths."""
    if arguments:
        raise Problem("`package` takes no arguments", code=EX_USAGE)
    cargo.check()
    tools.install_system(tools.BUILD_NEEDS)
    folder = layout.DOT / "packages"
    built, cli = build(folder), build_cli(folder)
    say("\n".join(layout.short(path) for path in (built.deb, built.rpm, cli)))
    return 0


def build(folder: Path) -> Packages:
    """Builds the agent's packages into a folder, from a statically linked agent."""
    cargo_deb, cargo_rpm = _tool(*CARGO_DEB), _tool(*CARGO_GENERATE_RPM)
    guest.static_agent()
    folder.mkdir(parents=True, exist_ok=True)
    with Step("building the agent's packages") as step:
        packages = Packages(folder / "vmwatch-agent.deb", folder / "vmwatch-agent.rpm")
        deb = _deb(cargo_deb, "agent", packages.deb)
        # With zstd, the default, the .rpm would take 20 s instead of 4, and be 3.8 MB instead of 4.9.
        compression = ["--payload-compress", "gzip"]
        rpm = [cargo_rpm, "generate-rpm", "--package", "agent", *BUILT, *compression, "--output", packages.rpm]
        _write(step, "package-deb", deb)
        _write(step, "package-rpm", rpm)
        step.done()
    return packages


def build_cli(folder: Path) -> Path:
    """Builds the package of the command line into a folder and returns its path."""
    cargo_deb = _tool(*CARGO_DEB)
    program = guest.static_program("vmwatch-cli", "vmwatch")
    folder.mkdir(parents=True, exist_ok=True)
    with Step("building the package of the command line") as step:
        completions = program.with_name("completion")
        completions.mkdir(exist_ok=True)
        for shell, name in COMPLETIONS.items():
            script = subprocess.run([program, "completion", shell], stdout=subprocess.PIPE, check=True).stdout
            (completions / name).write_bytes(script)
        package = folder / "vmwatch-cli.deb"
        _write(step, "package-cli", _deb(cargo_deb, "vmwatch-cli", package))
        step.done()
    return package


def _deb(cargo_deb: Path, crate: str, package: Path) -> list:
    return [cargo_deb, "deb", "--package", crate, "--no-build", "--no-strip", *BUILT, "--output", package]


def _write(step: Step, log: str, command: list) -> None:
    """Runs a tool that writes a package. It looks for programs in the folder of this target and this profile."""
    environment = {**os.environ, "CARGO_TARGET_DIR": str(guest.objects())}
    processes.run(step, command, layout.LOGS / f"{log}.log", env=environment, cwd=layout.ROOT)


def _tool(name: str, version: str) -> Path:
    home = layout.tools() / f"{name}-{version}"
    tools.install_crate(name, version, home)
    return home / "bin" / name
