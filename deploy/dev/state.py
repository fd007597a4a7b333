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
    """A program that ./dev has started."""

    name: str
    process: Identity
    # The address at which the program accepts connections: the path of a socket, HOST:PORT, or a URL.
    address: str
    # The HOST:PORT of the program's /readyz. It is empty for programs without /readyz, which count as ready when they
    # accept connections.
    health: str
    log: str


@dataclass
class State:
    """The state of the running stack or of the last one. Its ports are reused at the next start."""

    ports: Dict[str, int] = field(default_factory=dict)
    # The ./dev process that starts or watches the stack.
    guard: Optional[Identity] = None
    # Whether the stack was started with --detach and no ./dev process watches it.
    detached: bool = False
    programs: List[Running] = field(default_factory=list)
    gateway: str = ""
    nats: str = ""
    # The URI of the database without its password.
    database: str = ""
    admin: str = ""
    instance: str = ""
    # The hypervisor that `up --guest` started, if any.
    hypervisor: Optional[Hypervisor] = None

    def save(self) -> None:
        layout.DOT.mkdir(exist_ok=True)
        partial = FILE.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self), indent=2) + "\n")
        partial.replace(FILE)

    def running(self) -> List[Running]:
        """Returns the started programs, and the guest's QEMU process while the guest is on."""
        qemu = self.hypervisor.qemu() if self.hypervisor else None
        guest = [Running("guest", qemu, "", "", str(self.hypervisor.console))] if qemu else []
        return [*self.programs, *guest]

    def living(self) -> List[Running]:
        return [program for program in self.running() if program.process.alive()]


def load() -> State:
    """Returns the saved state, or an empty state if none was saved or it cannot be read."""
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
        "Use ./dev status and ./dev logs to inspect it, ./dev down to stop it.",
    )


def redacted(uri: str) -> str:
    """Returns a URI without user name and password."""
    return re.sub(r"(?<=://)[^/@]*@", "", uri)
