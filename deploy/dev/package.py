"""`package`: builds the agent's packages for Debian and for distributions that use RPM.

agent/Cargo.toml lists their files, which are in deploy/package.
"""

import functools
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from . import cargo, guest, layout, processes, tools
from .terminal import EX_USAGE, Problem, Step, say

# The versions of the tools that write the packages.
CARGO_DEB = ("cargo-deb", "3.8.0")
CARGO_GENERATE_RPM = ("cargo-generate-rpm", "0.21.1")
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
    """The paths of the packages."""

    deb: Path
    rpm: Path


def package(arguments) -> int:
    """Builds both packages for this machine's architecture and prints their paths."""
    if arguments:
        raise Problem("`package` takes no arguments", code=EX_USAGE)
    cargo.check()
    tools.install_system(tools.BUILD_NEEDS)
    built = build(layout.DOT / "packages")
    say(f"{layout.short(built.deb)}\n{layout.short(built.rpm)}")
    return 0


def build(folder: Path) -> Packages:
    """Builds both packages into a folder, from a statically linked agent."""
    cargo_deb, cargo_rpm = _tool(*CARGO_DEB), _tool(*CARGO_GENERATE_RPM)
    guest.static_agent()
    folder.mkdir(parents=True, exist_ok=True)
    with Step("building the agent's packages") as step:
        packages = Packages(folder / "vmwatch-agent.deb", folder / "vmwatch-agent.rpm")
        # The tools look for the program in the folder of this target and this profile.
        environment = {**os.environ, "CARGO_TARGET_DIR": str(guest.objects())}
        what = ["--target", guest.TARGET, "--profile", guest.PROFILE]
        deb = [cargo_deb, "deb", "--package", "agent", "--no-build", "--no-strip", *what, "--output", packages.deb]
        # With zstd, the default, the .rpm would take 20 s instead of 4, and be 3.8 MB instead of 4.9.
        compression = ["--payload-compress", "gzip"]
        rpm = [cargo_rpm, "generate-rpm", "--package", "agent", *what, *compression, "--output", packages.rpm]
        for name, command in (("deb", deb), ("rpm", rpm)):
            processes.run(step, command, layout.LOGS / f"package-{name}.log", env=environment, cwd=layout.ROOT)
        step.done()
    return packages


def _tool(name: str, version: str) -> Path:
    home = layout.tools() / f"{name}-{version}"
    tools.install_crate(name, version, home)
    return home / "bin" / name
