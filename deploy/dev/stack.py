"""The programs of a stack, with their arguments and environment and the order of starting and stopping them."""

import os
import secrets
import signal
import string
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional

from . import bus, interrupts, layout, machines, ports, processes
from .processes import Identity
from .state import Running, State
from .terminal import Problem, Step, warn
from .tools import Database

DEFAULT_LISTEN = "127.0.0.1:8086"
# The agent's sampling intervals are shorter than by default (10 s and 60 s), so the first rows arrive soon.
VM_INTERVAL, PROCESS_INTERVAL = "2s", "10s"

# The retention times are short, because short sampling intervals produce many rows and a stack left running overnight
# must not fill the disk. They are not set if the user provides the database.
RETENTION = {"VMWATCH_VM_RETENTION": "7d", "VMWATCH_PROCESS_RETENTION": "1d"}

READY_LIMIT = 60.0
# The time limit for stopping a program is longer than the programs' drain deadline, which is 10 s by default.
STOP_LIMIT = 15.0
LOG_LINES = 20

# Each group is stopped after the previous one has ended, so programs can still send what they have queued. The
# guest is stopped after the programs that could start it again.
STOP_ORDER = [
    ["agent"], ["gateway"], ["auth", "metrics", "lifecycle", "alert"], ["database", "libvirtd"], ["guest"], ["nats"],
]


@dataclass(frozen=True)
class Program:
    """A program of the stack that is to be started."""

    name: str
    argv: list
    env: Dict[str, str]
    address: str
    health: str = ""

    @property
    def log(self) -> Path:
        return layout.LOGS / f"{self.name}.log"


@dataclass(frozen=True)
class Plan:
    """The configuration of a stack."""

    binaries: Path
    # None if the user provides NATS. Then the programs log in as the user's settings say, and agents do not enrol.
    nats_server: Optional[Path]
    database: Optional[Database]
    listen: str
    state: State

    def servers(self) -> List[Program]:
        """Returns NATS and the database, unless the user provides them, and the hypervisor of `--guest`."""
        found = []
        host = ports.LOOPBACK
        if self.nats_server:
            port = self.state.ports["nats"]
            argv = [self.nats_server, "-a", host, "-p", port, "-c", bus.prepare()]
            found.append(Program("nats", argv, dict(os.environ), f"{host}:{port}"))
        if self.database:
            port = self.state.ports["database"]
            data = layout.DOT / self.database.program.name
            data.mkdir(exist_ok=True)
            found.append(
                Program("database", self.database.arguments(port, data), dict(os.environ), f"{host}:{port}")
            )
        own = self.state.hypervisor
        if own:
            found.append(Program("libvirtd", own.command(), own.environment(), own.socket))
        return found

    def setups(self) -> List[Program]:
        """Returns the commands that create or change the JetStream streams and KV buckets, unless the user provides NATS."""
        if not self.nats_server:
            return []
        found = [self._service(name, bus.login("vmwatch-setup")) for name in ("auth", "metrics", "lifecycle", "alert")]
        return [Program(f"{one.name}-setup", [*one.argv, "setup"], one.env, "") for one in found]

    def services(self) -> List[Program]:
        """Returns the services. They can start at the same time, because each waits for its dependencies."""
        return [
            self.auth(),
            self._service("metrics"),
            self._service("lifecycle", VMWATCH_HYPERVISORS=hypervisors(self.state)),
            self.alert(),
            self._service("gateway", VMWATCH_LISTEN=self.listen, **install_line(self.state.gateway, os.environ)),
        ]

    def auth(self) -> Program:
        return self._service(
            "auth",
            VMWATCH_ADMIN_USER=self.state.admin,
            VMWATCH_ADMIN_PASSWORD_FILE=str(layout.PASSWORD),
            VMWATCH_AGENT_NATS_URL=self.state.nats,
            **(bus.callout() if self.nats_server else {}),
            **agent_intervals(os.environ),
        )

    def alert(self) -> Program:
        """Returns alert-svc. Receivers on this machine are refused unless the user sets VMWATCH_ALERT_ALLOW."""
        health = [f"{ports.LOOPBACK}:{self.state.ports[name]}" for name in ("auth", "metrics", "lifecycle", "gateway", "agent")]
        own = {"VMWATCH_ALERT_KEY_FILE": str(bus.alert_key())} if self.nats_server else {}
        return self._service(
            "alert",
            VMWATCH_ALERT_INTERNAL=",".join(health),
            VMWATCH_PUBLIC_URL=os.environ.get("VMWATCH_PUBLIC_URL") or self.state.gateway,
            **own,
        )

    def agent(self, identity: Path) -> Program:
        """Returns this machine's agent. It logs in with this identity, which must be enrolled, unless the user provides NATS."""
        login = {"VMWATCH_AGENT_IDENTITY_DIR": str(identity)} if self.nats_server else {"VMWATCH_NATS_URL": self.state.nats}
        return self._ours(
            "agent",
            VMWATCH_INSTANCE_ID=self.state.instance,
            VMWATCH_AGENT_SPOOL_DIR=str(layout.DOT / "agent-spool"),
            **login,
            **agent_intervals(os.environ),
        )

    def _service(self, name: str, login: Optional[Dict[str, str]] = None, **settings: str) -> Program:
        """Returns a service, which logs in as its own NATS user unless another login is given or the user provides NATS."""
        own = (login or bus.login(f"vmwatch-{name}")) if self.nats_server else {}
        return self._ours(name, VMWATCH_NATS_URL=self.state.nats, **own, **settings)

    def _ours(self, name: str, **settings: str) -> Program:
        health = f"{ports.LOOPBACK}:{self.state.ports[name]}"
        # A login in the environment is for the server that the user provides.
        unused = bus.LOGIN if self.nats_server else ()
        env = {variable: value for variable, value in os.environ.items() if variable not in unused}
        env = {**env, "VMWATCH_HEALTH_LISTEN": health, **settings}
        if self.database:
            env = {**RETENTION, **env, "VMWATCH_MONGODB_URI": self.state.database}
        address = self.state.gateway if name == "gateway" else ""
        return Program(name, [self.binaries / f"vmwatch-{name}"], env, address, health)


def hypervisors(state: State) -> str:
    """Returns the hypervisors in VMWATCH_HYPERVISORS or else libvirt's test driver, and the hypervisor of `--guest`."""
    named = os.environ.get("VMWATCH_HYPERVISORS")
    if not named:
        named = f"dev=test://{urllib.parse.quote(str(machines.write_node_file(state.instance)))}"
    return f"{named},qemu={state.hypervisor.uri}" if state.hypervisor else named


def agent_intervals(environ) -> Dict[str, str]:
    """Returns short sampling intervals, unless the user has set one of them, because one must be a multiple of the other."""
    names = ("VMWATCH_AGENT_VM_INTERVAL", "VMWATCH_AGENT_PROCESS_INTERVAL")
    if any(environ.get(name) for name in names):
        return {}
    return dict(zip(names, (VM_INTERVAL, PROCESS_INTERVAL)))


def install_line(gateway: str, environ) -> Dict[str, str]:
    """Returns the settings with which the gateway serves the agent's packages that `./dev package` has built, unless the user
    has set them. The gateway accepts a URL without encryption only if it is one of this machine."""
    if environ.get("VMWATCH_PUBLIC_URL") or urllib.parse.urlsplit(gateway).hostname not in (ports.LOOPBACK, "::1", "localhost"):
        return {}
    packages = layout.DOT / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    return {"VMWATCH_PUBLIC_URL": gateway, "VMWATCH_PACKAGES_DIR": str(packages)}


def first_password() -> str:
    """Returns the administrator's initial password, which is generated once. Only this user can read its file."""
    if not layout.PASSWORD.exists():
        layout.DOT.mkdir(exist_ok=True)
        letters = string.ascii_letters + string.digits
        made = "".join(secrets.choice(letters) for _ in range(20))
        with open(os.open(layout.PASSWORD, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"{made}\n")
    return layout.PASSWORD.read_text().strip()


class Stack:
    """The programs that this ./dev has started."""

    def __init__(self, state: State):
        self.state = state
        self.children: Dict[str, subprocess.Popen] = {}

    def start(self, program: Program) -> None:
        # Signals are deferred, because an interrupt between the start of the program and its record would leave it
        # running.
        with interrupts.held_back():
            child = processes.spawn(program.argv, program.env, program.log)
            identity = Identity.of(child.pid) or Identity(child.pid, 0, "")
            self.children[program.name] = child
            self.state.programs.append(
                Running(program.name, identity, program.address, program.health, str(program.log))
            )
            self.state.save()

    def ended(self) -> List[Running]:
        """Returns the programs that have ended and were not reported yet."""
        names = [name for name, child in self.children.items() if child.poll() is not None]
        return [program for program in self.state.programs if program.name in names]

    def report_end(self, program: Running) -> Problem:
        child = self.children.pop(program.name)
        shown = processes.tail(Path(program.log), LOG_LINES)
        return Problem(
            f"{program.name} has ended ({processes.ended_how(child.returncode)})",
            f"The last lines of its log:\n\n{shown}\n\nFull log: {layout.short(program.log)}",
        )

    def _not_ready(self, waiting: Dict[str, str]) -> Problem:
        details = []
        for program in [program for program in self.state.programs if program.name in waiting]:
            details.append(f"{program.name}: {waiting[program.name]}. The last lines of {layout.short(program.log)}:\n")
            details.append(processes.tail(Path(program.log), LOG_LINES) + "\n")
        return Problem(f"not ready after {READY_LIMIT:.0f} s: {', '.join(waiting)}", "\n".join(details))

    def wait_until_ready(self, step: Step, names: List[str]) -> None:
        """Waits until all given programs are ready, and shows which of them are not."""
        waiting = {program.name: "" for program in self.state.programs if program.name in names}
        while waiting:
            for program in self.ended():
                raise self.report_end(program)
            for program in [p for p in self.state.programs if p.name in waiting]:
                state, reason = health_of(program)
                if state == "ready":
                    del waiting[program.name]
                else:
                    waiting[program.name] = reason
            step.tick("waiting for " + ", ".join(waiting))
            if step.elapsed() > READY_LIMIT and waiting:
                raise self._not_ready(waiting)
            if waiting:
                time.sleep(processes.TICK)


def health_of(program: Running):
    """Returns the state of a program (`ready`, `not ready` or `ended`) and the reason."""
    if not program.process.alive():
        return "ended", "the process has ended"
    if not program.health:
        return ("ready", "") if ports.accepts(program.address) else ("not ready", "not accepting connections yet")
    try:
        # The request bypasses any proxy that is configured in the environment.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://{program.health}/readyz", timeout=2) as answer:
            answer.read()
        return "ready", ""
    except urllib.error.HTTPError as error:
        return "not ready", error.read(500).decode(errors="replace").strip()
    except OSError:
        return "not ready", "not answering yet"


def stop(state: State) -> None:
    """Stops the programs recorded in the state, in order. A second Ctrl-C kills them at once."""
    with interrupts.held_back():
        for names in STOP_ORDER:
            group = [program for program in state.living() if program.name in names]
            for program in group:
                program.process.send(signal.SIGTERM)
            _await_end(group)
        state.programs.clear()
        if state.hypervisor:
            state.hypervisor.remove()
            state.hypervisor = None
        state.guard, state.detached = None, False
        state.save()


def _await_end(group: List[Running]) -> None:
    if not group:
        return
    with Step("stopping " + ", ".join(program.name for program in group)) as step:
        while any(program.process.alive() for program in group):
            interrupted = interrupts.pending()
            if interrupted or step.elapsed() > STOP_LIMIT:
                for program in [p for p in group if p.process.alive()]:
                    if not interrupted:
                        warn(f"{program.name} did not end within {STOP_LIMIT:.0f} s of SIGTERM; killing it")
                    program.process.send(signal.SIGKILL)
                    program.process.wait(5)
            step.tick()
            time.sleep(0.05)
        step.done()
