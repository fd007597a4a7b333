"""The state of the stack in .dev/state.json, and the lock that allows one stack per checkout."""

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
    # A socket path, host:port, or a URL.
    address: str
    # host:port of /readyz; empty for programs without it, which are ready when they accept connections.
    health: str
    log: str


@dataclass
class State:
    """The current or last state of the stack. Ports are kept for the next start."""

    ports: Dict[str, int] = field(default_factory=dict)
    # The `dev` process that starts or watches the stack.
    guard: Optional[Identity] = None
    # Started with --detach and no longer watched.
    detached: bool = False
    programs: List[Running] = field(default_factory=list)
    gateway: str = ""
    nats: str = ""
    # URI without the password.
    database: str = ""
    admin: str = ""
    instance: str = ""
    # Set by `up --guest`.
    hypervisor: Optional[Hypervisor] = None

    def save(self) -> None:
        layout.DOT.mkdir(exist_ok=True)
        partial = FILE.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self), indent=2) + "\n")
        partial.replace(FILE)

    def running(self) -> List[Running]:
        """The started programs, and the guest if it is on (it is a child of libvirt)."""
        qemu = self.hypervisor.qemu() if self.hypervisor else None
        guest = [Running("guest", qemu, "", "", str(self.hypervisor.console))] if qemu else []
        return [*self.programs, *guest]

    def living(self) -> List[Running]:
        return [program for program in self.running() if program.process.alive()]


def load() -> State:
    """The saved state, or an empty one if there is none or it is unreadable."""
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
    """Holds the lock while a stack is started, watched or stopped. The kernel releases it when this process ends."""
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
        f"a stack of this checkout is already running or starting{by}",
        "./dev status and ./dev logs show it, ./dev down stops it.",
    )


def redacted(uri: str) -> str:
    """A URI without user and password."""
    return re.sub(r"(?<=://)[^/@]*@", "", uri)
