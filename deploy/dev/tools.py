"""What a stack needs beside its own programs, from PATH or installed once into a cache for all checkouts."""

import contextlib
import fcntl
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, List

from . import apt, cargo, layout, processes
from .terminal import Problem, Step, note, say

# Per-key TTL, and the key-value interface that the client library speaks.
NATS_LEAST = (2, 11)
# The first Debian release with such a server.
NATS_SUITE = "forky"

STAND_IN = "secantus-mdb"
STAND_IN_VERSION = "0.5.3-beta.196"
STAND_IN_PROGRAM = "secantusd-rs"


@dataclass(frozen=True)
class Need:
    """Something of the system: the Debian package that has it, and how to see that it is there."""

    package: str
    what: str
    present: Callable[[], bool]


def _program(name: str) -> Callable[[], bool]:
    return lambda: shutil.which(name) is not None


def _libvirt() -> bool:
    probe = ["pkg-config", "--exists", "libvirt"]
    return shutil.which("pkg-config") is not None and subprocess.run(probe, capture_output=True).returncode == 0


BUILD_NEEDS = [
    Need("gcc", "a C compiler, the linker of Rust", _program("cc")),
    Need("libc6-dev", "the C library's headers", lambda: Path("/usr/include/stdlib.h").exists()),
    Need("pkg-config", "pkg-config", _program("pkg-config")),
    Need("libvirt-dev", "libvirt's library and headers", _libvirt),
    Need("curl", "curl, for the lines that `up` prints", _program("curl")),
]
CXX = Need("g++", "a C++ compiler", _program("c++"))
STAND_IN_NEEDS = [
    Need("cmake", "cmake", _program("cmake")),
    Need("make", "make", _program("make")),
    CXX,
]


def install_system(needs: List[Need]) -> None:
    """Installs the Debian packages of what is missing; where there is no apt, tells what to install."""
    missing = [need for need in needs if not need.present()]
    if not missing:
        return
    if not apt.is_here():
        raise Problem(
            "missing on this machine: " + "; ".join(need.what for need in missing),
            "Install them with your system's package manager (in Debian they are: "
            + " ".join(need.package for need in missing) + "), then run this again.",
        )
    say("Missing on this machine: " + "; ".join(f"{need.what} ({need.package})" for need in missing))
    apt.install([need.package for need in missing], layout.LOGS / "apt.log")


@contextlib.contextmanager
def installing():
    """Only one `dev` installs at a time; what another one installed in the meantime is there afterwards."""
    layout.tools().mkdir(parents=True, exist_ok=True)
    with open(layout.tools() / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note("Another ./dev is installing tools; waiting for it.")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def nats_version(text: str):
    """`(2, 15)` out of `nats-server: v2.15.1`; (0, 0) where there is no version."""
    match = re.search(r"v?(\d+)\.(\d+)\.\d+", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _version_of(nats_server) -> tuple:
    try:
        said = subprocess.run([nats_server, "--version"], capture_output=True, text=True)
    except OSError:
        return (0, 0)
    return nats_version(said.stdout + said.stderr)


def nats_server() -> Path:
    """nats-server from PATH where it is new enough, else Debian's, unpacked into the cache."""
    least = ".".join(map(str, NATS_LEAST))
    on_path = shutil.which("nats-server")
    if on_path:
        if _version_of(on_path) >= NATS_LEAST:
            return Path(on_path)
        note(f"{on_path} is older than {least} and is left alone.")
    cached = layout.tools() / "nats-server" / "nats-server"
    if cached.exists():
        return cached
    elsewhere = f"Put nats-server {least} or newer in PATH, or name a running one by VMWATCH_NATS_URL."
    if not apt.is_here():
        raise Problem(f"nats-server {least} or newer is not in PATH, and this is no Debian to take it from", elsewhere)
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
        raise Problem(f"the one of Debian {NATS_SUITE} that the mirror has is too old, or does not run here")
    # Whole or not at all: the last step is a rename.
    (unpacked / "usr/sbin").rename(program.parent)
    shutil.rmtree(partial)


@dataclass(frozen=True)
class Database:
    """A database server's program."""

    program: Path
    description: str

    def arguments(self, port: int, data: Path) -> list:
        if self.program.name == STAND_IN_PROGRAM:
            # Without --sync-on-commit a kill -9 loses acknowledged writes; a small cache and log for a small stack.
            return [
                self.program, "--port", port, "--storage-path", data, "--standalone", "--sync-on-commit",
                "--cache-size", "256M", "--log-file-max", "16MB",
            ]
        return [self.program, "--port", port, "--bind_ip", "127.0.0.1", "--dbpath", data]


def database() -> Database:
    """mongod from PATH, else the stand-in, built into the cache."""
    mongod = shutil.which("mongod")
    if mongod:
        return Database(Path(mongod), "mongod from PATH")
    home = layout.tools() / f"secantus-{STAND_IN_VERSION}"
    program = home / "bin" / STAND_IN_PROGRAM
    if not program.exists():
        say(
            f"No mongod in PATH. Building {STAND_IN} {STAND_IN_VERSION}, a stand-in for MongoDB for development and\n"
            "tests only: a separate program, once for all checkouts. It takes 10 to 20 minutes of CPU time. To use\n"
            "a MongoDB instead, stop this with Ctrl-C and set VMWATCH_MONGODB_URI."
        )
        install_system(STAND_IN_NEEDS)
        with installing():
            if not program.exists():
                _install_stand_in(home)
    return Database(program, f"{STAND_IN} {STAND_IN_VERSION}, a stand-in for MongoDB, for development and tests only")


def _install_stand_in(home: Path) -> None:
    partial = home.with_name(f".{home.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    # Kept over an interruption, so that a second try goes on where the first one stopped.
    objects = layout.cache() / "build" / home.name
    command = [
        "cargo", "install", STAND_IN, "--version", STAND_IN_VERSION, "--locked",
        # It asks for the newest compiler but builds with that of this workspace.
        "--ignore-rust-version",
        "--root", partial,
    ]
    with Step(f"building {STAND_IN}") as step:
        processes.run(
            step, command, layout.LOGS / "stand-in.log", cargo.progress,
            env={**cargo.environment(), "CARGO_TARGET_DIR": str(objects)}, cwd=layout.cache(),
        )
        step.done()
    partial.rename(home)
    shutil.rmtree(objects, ignore_errors=True)
