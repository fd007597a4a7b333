"""`up` installs what is missing, builds vmwatch and starts a stack, even on a fresh machine."""

import json
import os
import re
import socket
import time
from pathlib import Path
from typing import List, Optional

from . import agents, cargo, guest as image, guide, interrupts, layout, machines, ports, processes, stack, state, tools, web
from .hypervisor import Hypervisor
from .processes import Identity
from .stack import Plan, Program, Stack
from .state import State, redacted
from .terminal import EX_USAGE, Problem, Step, note, say, seconds, tell, warn
from .tools import Database


def up(arguments) -> int:
    """Starts a stack and stops it on Ctrl-C. With --detach the stack keeps running; --guest adds a real VM, in which no
    agent runs with --no-agent."""
    if set(arguments) - {"--detach", "--guest", "--no-agent"}:
        raise Problem("`up` takes only --detach, --guest and --no-agent", code=EX_USAGE)
    detach, guest, with_agent = "--detach" in arguments, "--guest" in arguments, "--no-agent" not in arguments
    if not (guest or with_agent):
        raise Problem("--no-agent requires --guest: it starts the guest without an agent", code=EX_USAGE)
    if guest and os.environ.get("VMWATCH_NATS_URL"):
        raise Problem("--guest needs the stack's own NATS server; unset VMWATCH_NATS_URL", code=EX_USAGE)
    interrupts.install()
    with state.only_one():
        previous = state.load()
        _stop_leftovers(previous)
        began = time.monotonic()
        listen = _listen_address()
        running = Stack(State(ports=previous.ports, guard=Identity.of(os.getpid())))
        running.state.save()
        try:
            _start(running, listen, detach, guest, with_agent)
        except BaseException:
            stack.stop(running.state)
            raise
        note(f"ready after {seconds(time.monotonic() - began)}")
        return 0 if detach else _guard(running)


def install(arguments) -> int:
    """Installs the tools for `up` and `test`, without building vmwatch."""
    if arguments:
        raise Problem("`install` takes no arguments", code=EX_USAGE)
    cargo.check()
    tools.install_system(tools.BUILD_NEEDS)
    say(f"nats-server: {tools.nats_server()}")
    database = tools.database()
    say(f"database:    {database.program} ({database.description})")
    return 0


def _stop_leftovers(previous: State) -> None:
    """Stops programs that a killed ./dev left running. Raises a Problem if a detached stack is running."""
    living = previous.living()
    if not living:
        if previous.hypervisor:
            previous.hypervisor.remove()
        return
    if previous.detached:
        state.running_already()
    warn("An earlier ./dev up was killed and left programs running; stopping them first.")
    stack.stop(previous)


def _listen_address() -> str:
    """Returns the gateway's address. Raises a Problem before anything is built if the address is not available."""
    listen = os.environ.get("VMWATCH_LISTEN") or stack.DEFAULT_LISTEN
    try:
        host, port = ports.parse_address(listen)
    except ValueError as error:
        raise Problem(f"VMWATCH_LISTEN: {error}", code=EX_USAGE) from None
    if not os.environ.get("VMWATCH_NATS_URL") and not ports.has_loopback(host):
        every = "[::]" if ":" in host else "0.0.0.0"
        raise Problem(
            f"VMWATCH_LISTEN: at {host} this machine's agent cannot enrol, because the gateway has no TLS",
            f"Set VMWATCH_LISTEN={every}:{port}, which includes this address and the loopback address.",
            EX_USAGE,
        )
    if not ports.is_free(port, host):
        another = ports.choose(["gateway"], {"gateway": port + 1}, str(layout.DOT))["gateway"]
        raise Problem(
            f"port {port} is in use; set VMWATCH_LISTEN=127.0.0.1:PORT",
            f"For example: VMWATCH_LISTEN=127.0.0.1:{another} ./dev up",
        )
    return listen


def _start(running: Stack, listen: str, detach: bool, guest: bool, with_agent: bool) -> None:
    cargo.check()
    tools.install_system(tools.BUILD_NEEDS)
    nats_server = _nats_server()
    database = _database()
    web.build()
    binaries = cargo.build("building vmwatch")
    guest_image = image.image() if guest else None
    _fill_in(running.state, listen, nats_server is not None, database is not None)
    if guest:
        # The hypervisor is recorded as soon as it exists, so it is removed together with the stack.
        with interrupts.held_back():
            running.state.hypervisor = Hypervisor.prepare(guest_image, with_agent)
            running.state.save()
    plan = Plan(binaries, nats_server, database, listen, running.state)
    password = stack.first_password()
    servers = plan.servers()
    if servers:
        _launch(running, servers)
    if guest:
        running.state.hypervisor.define(stack.agent_intervals({}))
    _set_up(plan.setups())
    _launch(running, plan.services())
    if nats_server:
        _enrol_agents(plan)
    _launch(running, [plan.agent(agents.IDENTITY)])
    guide.await_rows(running.state, password)
    if detach:
        running.state.guard, running.state.detached = None, True
    running.state.save()
    described = database.description if database else "given by VMWATCH_MONGODB_URI"
    guide.show(running.state, password, f"{running.state.database}  ({described})", binaries, detach)


def _set_up(commands: List[Program]) -> None:
    if not commands:
        return
    with Step("creating streams and KV buckets") as step:
        for command in commands:
            processes.run(step, command.argv, command.log, env=command.env, limit=stack.READY_LIMIT)
        step.done()


def _enrol_agents(plan: Plan) -> None:
    own = plan.state.hypervisor
    with Step("enrolling the agents") as step:
        agents.enrol(plan, plan.state.instance, agents.IDENTITY)
        if own and own.with_agent:
            agents.enrol(plan, own.instance, own.identity)
            own.install_identity(plan.state.ports["nats"])
        step.done()


def _launch(running: Stack, programs: List[Program]) -> None:
    names = [program.name for program in programs]
    with Step("starting " + ", ".join(names)) as step:
        for program in programs:
            running.start(program)
        running.wait_until_ready(step, names)
        step.done()


def _nats_server() -> Optional[Path]:
    """Returns the NATS server to start, or None if the user provides one."""
    given = os.environ.get("VMWATCH_NATS_URL")
    if not given:
        return tools.nats_server()
    check_nats(given)
    say(f"Using the NATS server at VMWATCH_NATS_URL: {redacted(given)}")
    return None


def _database() -> Optional[Database]:
    """Returns the database to start, or None if the user provides one."""
    if os.environ.get("VMWATCH_MONGODB_URI") or os.environ.get("VMWATCH_MONGODB_URI_FILE"):
        return None
    return tools.database()


def check_nats(urls: str) -> None:
    """Checks the version of the user's NATS server and whether it has JetStream, in the INFO message that it sends first."""
    url = urls.split(",")[0].strip()
    address = re.match(r"(?:\w+://)?(?:[^@/]*@)?([^@/]+)", url)[1]
    host, port = ports.parse_address(address if ":" in address else f"{address}:4222")
    try:
        with socket.create_connection((host, port), timeout=5) as connection:
            # NATS sends INFO in plain text, even if TLS follows.
            greeting = json.loads(connection.makefile("rb").readline(65536).partition(b"INFO ")[2])
    except (OSError, ValueError) as error:
        raise Problem(f"no NATS server at VMWATCH_NATS_URL, {redacted(url)}: {error}") from None
    least = ".".join(map(str, tools.NATS_LEAST))
    if tools.nats_version(greeting.get("version", "")) < tools.NATS_LEAST:
        raise Problem(f"NATS {greeting.get('version')} at VMWATCH_NATS_URL is too old: {least} or newer is required")
    if not greeting.get("jetstream"):
        raise Problem("the NATS server at VMWATCH_NATS_URL has no JetStream", "Start it with JetStream (-js).")


def _fill_in(current: State, listen: str, own_nats: bool, own_database: bool) -> None:
    """Sets the addresses and names that the programs use and that `status` shows."""
    host, port = ports.parse_address(listen)
    names = ["nats", "database", "auth", "metrics", "lifecycle", "alert", "gateway", "agent"]
    current.ports = ports.choose(names, current.ports, str(layout.DOT), lambda one: one != port and ports.is_free(one))
    current.gateway = f"http://{ports.reachable(host)}:{port}"
    current.nats = f"nats://{ports.LOOPBACK}:{current.ports['nats']}" if own_nats else os.environ["VMWATCH_NATS_URL"]
    given = redacted(os.environ.get("VMWATCH_MONGODB_URI", ""))
    current.database = f"mongodb://{ports.LOOPBACK}:{current.ports['database']}" if own_database else given
    current.admin = os.environ.get("VMWATCH_ADMIN_USER") or "admin"
    current.instance = machines.instance_id()


def _guard(running: Stack) -> int:
    """Watches the stack until Ctrl-C. Reports programs that end and keeps the others running."""
    code = 0
    try:
        while True:
            for program in running.ended():
                code = 1
                tell(running.report_end(program))
                say("The other programs keep running. Ctrl-C stops them.")
            if not running.children:
                raise Problem("every program has ended")
            time.sleep(0.5)
    except KeyboardInterrupt:
        say()
    finally:
        stack.stop(running.state)
    return code
