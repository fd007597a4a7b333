"""Finds the third-party programs of a stack in PATH, or installs them once into a cache that all checkouts share."""

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, List

from . import apt, cargo, layout, processes
from .terminal import Problem, Step, note, say

# The minimum version of NATS. It is required for per-key TTL and by the client library's key-value interface.
NATS_LEAST = (2, 11)
# The first Debian release with a sufficiently recent nats-server.
NATS_SUITE = "forky"

# PATH with the folders that only root has in PATH.
ADMIN_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"

STAND_IN = "secantus-mdb"
STAND_IN_VERSION = "0.5.3-beta.196"
STAND_IN_PROGRAM = "secantusd-rs"


@dataclass(frozen=True)
class Need:
    """A system dependency: its Debian package, a description, and a function that checks whether it is present."""

    package: str
    what: str
    present: Callable[[], bool]


def _program(name: str) -> Callable[[], bool]:
    return lambda: shutil.which(name) is not None


def _admin_program(name: str) -> bool:
    """Returns a check whether the program is installed, even in a folder that only root has in PATH."""
    return shutil.which(name, path=ADMIN_PATH) is not None


def _libvirt() -> bool:
    probe = ["pkg-config", "--exists", "libvirt"]
    return shutil.which("pkg-config") is not None and subprocess.run(probe, capture_output=True).returncode == 0


def _fake_time() -> bool:
    return any(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))


BUILD_NEEDS = [
    Need("gcc", "a C compiler, which links Rust programs", _program("cc")),
    Need("libc6-dev", "the C library's headers", lambda: Path("/usr/include/stdlib.h").exists()),
    Need("pkg-config", "pkg-config", _program("pkg-config")),
    Need("libvirt-dev", "libvirt's library and headers", _libvirt),
    Need("curl", "curl, for the command lines printed by `up`", _program("curl")),
    Need("openssl", "openssl, which makes keys and certificates", _program("openssl")),
]
CLOCK_NEEDS = [
    Need("libfaketime", "libfaketime, with which tests and benchmarks change the clock of a program", _fake_time),
]
FILTER_NEEDS = [
    Need("nftables", "nft, with which a test limits a guest's traffic", lambda: _admin_program("nft")),
    Need("iproute2", "ip, with which a test creates a network namespace", lambda: _admin_program("ip")),
]
CXX = Need("g++", "a C++ compiler", _program("c++"))
STAND_IN_NEEDS = [
    Need("cmake", "cmake", _program("cmake")),
    Need("make", "make", _program("make")),
    CXX,
]


def install_system(needs: List[Need]) -> None:
    """Installs the Debian packages of missing dependencies. Without apt, raises a Problem that lists them."""
    missing = [need for need in needs if not need.present()]
    if not missing:
        return
    if not apt.is_here():
        raise Problem(
            "missing on this machine: " + "; ".join(need.what for need in missing),
            "Install them with your system's package manager (the Debian packages are: "
            + " ".join(need.package for need in missing) + "), then try again.",
        )
    say("Missing on this machine: " + "; ".join(f"{need.what} ({need.package})" for need in missing))
    apt.install([need.package for need in missing], layout.LOGS / "apt.log")


@contextlib.contextmanager
def installing():
    """A lock that allows only one ./dev to install tools at a time. Its holder must check again what is already installed."""
    layout.tools().mkdir(parents=True, exist_ok=True)
    with open(layout.tools() / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note("Waiting for another ./dev that is installing tools.")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def nats_version(text: str):
    """Extracts `(2, 15)` from `nats-server: v2.15.1`; `(0, 0)` if the text contains no version."""
    match = re.search(r"v?(\d+)\.(\d+)\.\d+", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _version_of(nats_server) -> tuple:
    try:
        result = subprocess.run([nats_server, "--version"], capture_output=True, text=True)
    except OSError:
        return (0, 0)
    return nats_version(result.stdout + result.stderr)


def nats_server() -> Path:
    """Returns the path of nats-server: from PATH if it is new enough, otherwise from a Debian package unpacked into the cache."""
    least = ".".join(map(str, NATS_LEAST))
    on_path = shutil.which("nats-server")
    if on_path:
        if _version_of(on_path) >= NATS_LEAST:
            return Path(on_path)
        note(f"{on_path} is not used because it is older than {least}.")
    cached = layout.tools() / "nats-server" / "nats-server"
    if cached.exists():
        return cached
    elsewhere = f"Put nats-server {least} or newer in PATH, or set VMWATCH_NATS_URL to a running server."
    if not apt.is_here():
        raise Problem(f"nats-server {least} or newer is not in PATH, and it cannot be downloaded because this system has no apt", elsewhere)
    with installing():
        if not cached.exists():
            try:
                _install_nats(cached)
            except Problem as problem:
                todo = f"{elsewhere}\n{problem.todo}"
                raise Problem(f"nats-server could not be installed: {problem}", todo) from None
    return cached


def _install_nats(program: Path) -> None:
    partial = layout.tools() / ".nats-server.partial"
    shutil.rmtree(partial, ignore_errors=True)
    unpacked = apt.fetch("nats-server", NATS_SUITE, partial, layout.LOGS / "nats-server.log")
    if _version_of(unpacked / "usr/sbin/nats-server") < NATS_LEAST:
        raise Problem(f"the nats-server of Debian {NATS_SUITE} on the mirror is too old or does not run on this machine")
    # The final rename makes the installation atomic.
    (unpacked / "usr/sbin").rename(program.parent)
    shutil.rmtree(partial)


def nginx() -> Path:
    """Returns the path of nginx."""
    return _debian_program("nginx", "nginx", "nginx", "-v", lambda unpacked: unpacked / "usr/sbin")


def prometheus() -> Path:
    """Returns the path of Prometheus, which tests let scrape the gateway."""
    return _debian_program("prometheus", "prometheus", "prometheus", "--version", lambda unpacked: unpacked / "usr/bin")


def alertmanager() -> Path:
    """Returns the path of Alertmanager, which tests use as a receiver of alerts."""
    name = "prometheus-alertmanager"
    return _debian_program("alertmanager", name, name, "--version", _alertmanager_folder)


# Debian's Alertmanager reads its default template from /usr/share/prometheus, wherever the program is. The script mounts a
# /usr/share that contains it, which only the program sees.
ALERTMANAGER_SCRIPT = """#!/bin/sh
exec unshare --user --map-root-user --mount sh -c '
mount -t tmpfs tmpfs /usr/share && ln -s "$0/share/prometheus" /usr/share/prometheus || exit
exec "$0/bin/prometheus-alertmanager" "$@"
' "$(dirname "$(readlink -f "$0")")" "$@"
"""


def _alertmanager_folder(unpacked: Path) -> Path:
    script = unpacked / "usr" / "prometheus-alertmanager"
    script.write_text(ALERTMANAGER_SCRIPT)
    script.chmod(0o755)
    return script.parent


def _debian_program(name: str, package: str, program: str, probe: str, folder: Callable[[Path], Path]) -> Path:
    """Returns a program: from PATH or /usr/sbin, otherwise from a Debian package unpacked into the cache.

    The package is not installed, because that would start the program as a service. `folder` returns the folder of the
    unpacked package that has the program, and `probe` is an argument with which the program succeeds at once.
    """
    installed = shutil.which(program, path=ADMIN_PATH)
    if installed:
        return Path(installed)
    cached = layout.tools() / name / program
    elsewhere = f"Install {package}, or set VMWATCH_TEST_{name.upper()} to the program."
    if not cached.exists() and not apt.is_here():
        raise Problem(f"{package} is not installed, and it cannot be downloaded because this system has no apt", elsewhere)
    with installing():
        if not cached.exists():
            try:
                _unpack_program(package, cached, probe, folder)
            except Problem as problem:
                raise Problem(f"{package} could not be fetched: {problem}", f"{elsewhere}\n{problem.todo}") from None
    return cached


def _unpack_program(package: str, program: Path, probe: str, folder: Callable[[Path], Path]) -> None:
    partial = layout.tools() / f".{package}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    unpacked = folder(apt.fetch(package, apt.codename(), partial, layout.LOGS / f"{package}.log"))
    found = unpacked / program.name
    if not found.exists() or subprocess.run([found, probe], capture_output=True).returncode != 0:
        raise Problem(f"the package {package} of this system's release contains no program that runs on this machine")
    # The final rename makes the installation atomic.
    unpacked.rename(program.parent)
    shutil.rmtree(partial)


@dataclass(frozen=True)
class Database:
    """A database server program and how to start it."""

    program: Path
    description: str

    def arguments(self, port: int, data: Path) -> list:
        if self.program.name == STAND_IN_PROGRAM:
            # Without --sync-on-commit, SIGKILL would lose acknowledged writes. A small cache and log are sufficient for
            # development.
            return [
                self.program, "--port", port, "--storage-path", data, "--standalone", "--sync-on-commit",
                "--cache-size", "256M", "--log-file-max", "16MB",
            ]
        return [self.program, "--port", port, "--bind_ip", "127.0.0.1", "--dbpath", data]


def database() -> Database:
    """Returns mongod from PATH, otherwise the stand-in for MongoDB, which is built into the cache."""
    mongod = shutil.which("mongod")
    if mongod:
        return Database(Path(mongod), "mongod from PATH")
    home = layout.tools() / f"secantus-{STAND_IN_VERSION}"
    program = home / "bin" / STAND_IN_PROGRAM
    if not program.exists():
        say(
            f"mongod is not in PATH. Building {STAND_IN} {STAND_IN_VERSION}, a stand-in for MongoDB (for development\n"
            "and tests only). This is done once for all checkouts and takes 10 to 20 minutes of CPU time. To use a\n"
            "MongoDB instead, press Ctrl-C and set VMWATCH_MONGODB_URI."
        )
        install_system(STAND_IN_NEEDS)
        # The package declares a newer compiler than it needs; the workspace's compiler can build it.
        install_crate(STAND_IN, STAND_IN_VERSION, home, "--ignore-rust-version")
    return Database(program, f"{STAND_IN} {STAND_IN_VERSION}, a stand-in for MongoDB, for development and tests only")


def install_crate(name: str, version: str, home: Path, *options: str) -> None:
    """Builds the programs of a package from crates.io into the folder `home`, if it does not exist."""
    with installing():
        if home.exists():
            return
        partial = home.with_name(f".{home.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        # The compiled objects are kept if the build is interrupted, so the next attempt continues it.
        objects = layout.cache() / "build" / home.name
        command = ["cargo", "install", name, "--version", version, "--locked", *options, "--root", partial]
        with Step(f"building {name}") as step:
            processes.run(
                step, command, layout.LOGS / f"{name}.log", cargo.progress,
                env={**cargo.environment(), "CARGO_TARGET_DIR": str(objects)}, cwd=layout.cache(),
            )
            step.done()
        partial.rename(home)
        shutil.rmtree(objects, ignore_errors=True)
