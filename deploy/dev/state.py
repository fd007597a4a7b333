"""What runs: .dev/state.json, written at each change, and the lock that makes one stack a checkout."""

import contextlib
import fcntl
import json
import re
from dataclasses import asdict, dataclass, field
from typing import Dict, List, Optional

from . import layout
from .hypervisor import Hypervisor
from .processes import Identity
from .terminal import Problem

FILE = layout.DOT / "state.json"


@dataclass
class Running:
    """A program that was started."""

    name: str
    process: Identity
    # Of a socket, or host:port, or a URL.
    address: str
    # host:port of /readyz; nothing for programs that have none and are ready when they accept connections.
    health: str
    log: str


@dataclass
class State:
    """The stack as it is now, or as it last was; ports are remembered."""

    ports: Dict[str, int] = field(default_factory=dict)
    # The `dev` that starts or guards it.
    guard: Optional[Identity] = None
    # Started with --detach, and left to itself.
    detached: bool = False
    programs: List[Running] = field(default_factory=list)
    gateway: str = ""
    nats: str = ""
    # Without a password.
    database: str = ""
    admin: str = ""
    instance: str = ""
    # Of `up --guest`.
    hypervisor: Optional[Hypervisor] = None

    def save(self) -> None:
        layout.DOT.mkdir(exist_ok=True)
        partial = FILE.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self), indent=2) + "\n")
        partial.replace(FILE)

    def running(self) -> List[Running]:
        """The programs that were started, and the guest where it is on: that one is libvirt's child."""
        qemu = self.hypervisor.qemu() if self.hypervisor else None
        guest = [Running("guest", qemu, "", "", str(self.hypervisor.console))] if qemu else []
        return [*self.programs, *guest]

    def living(self) -> List[Running]:
        return [program for program in self.running() if program.process.alive()]


def load() -> State:
    """The last state; an empty one where there is none that can be read."""
    try:
        data = json.loads(FILE.read_text())
        data["programs"] = [Running(**{**item, "process": Identity(**item["process"])}) for item in data["programs"]]
        data["guard"] = Identity(**data["guard"]) if data["guard"] else None
        data["hypervisor"] = Hypervisor(**data["hypervisor"]) if data.get("hypervisor") else None
        return State(**data)
    except (OSError, ValueError, TypeError, KeyError):
        return State()


@contextlib.contextmanager
def only_one():
    """Held while a stack is started, guarded or stopped. The kernel lets go of it when this process ends."""
    layout.DOT.mkdir(exist_ok=True)
    with open(layout.DOT / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            running_already()
        yield


def running_already() -> None:
    guard = load().guard
    by = f" (./dev up, pid {guard.pid})" if guard and guard.alive() else ""
    raise Problem(
        f"a stack of this checkout is up or on its way{by}",
        "./dev status shows it, ./dev logs tells what it does, ./dev down stops it.",
    )


def redacted(uri: str) -> str:
    """A URI without the user and password that it may hold."""
    return re.sub(r"(?<=://)[^/@]*@", "", uri)
