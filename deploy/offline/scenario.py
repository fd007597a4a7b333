"""Tests compose.yaml: start, documented methods, hardening, backup and restore, scaling, rolling restarts under load."""

import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import List

from dev import layout, machines, ports, processes
from dev.terminal import Problem, Step, say, style

from .client import Api, Load
from .engine import LOGS, STEP_LIMIT, Engine

INSTANCE = "docker-host"
READY_LIMIT = 90.0
# The number of replicas of each service in the scaling test.
SCALED = {"metrics-svc": 3, "auth-svc": 2, "lifecycle-svc": 2, "alert-svc": 2, "gateway": 2}


class Project:
    """A compose project with the unchanged compose.yaml and its own secrets, so it does not conflict with another stack."""

    def __init__(self, engine: Engine, images: dict):
        self.engine = engine
        self.name = f"vmwatch-offline-{os.getpid()}"
        self.folder = layout.DOT / "offline" / self.name
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        shutil.copy(layout.ROOT / "compose.yaml", self.folder)
        for part in ("nats", "mongo", "compose", "secrets", "certificates.py", "nkeys.py", "observability"):
            source = layout.ROOT / "deploy" / part
            copy = shutil.copytree if source.is_dir() else shutil.copy
            (self.folder / "deploy").mkdir(exist_ok=True)
            copy(source, self.folder / "deploy" / part)
        names = ["api", "api2", "bus", "websocket"]
        while True:
            chosen = ports.choose(names, {}, self.name)
            # The gateways need two consecutive ports.
            if ports.is_free(chosen["api"] + 1):
                break
            names.append(f"next{len(names)}")
        self.settings = {
            **images,
            "VMWATCH_VERSION": "offline",
            "VMWATCH_API_PORTS": f"{chosen['api']}-{chosen['api'] + 1}",
            "VMWATCH_BUS_PORT": str(chosen["bus"]),
            "VMWATCH_BUS_WEBSOCKET_PORT": str(chosen["websocket"]),
            "VMWATCH_AGENT_NATS_URL": f"tls://127.0.0.1:{chosen['bus']}",
            "VMWATCH_AGENT_GATEWAY_URL": f"http://127.0.0.1:{chosen['api']}",
            "VMWATCH_AGENT_VM_INTERVAL": "1s",
            "VMWATCH_AGENT_PROCESS_INTERVAL": "2s",
        }
        subprocess.run([self.folder / "deploy" / "secrets"], check=True, stdout=subprocess.DEVNULL)

    def secret(self, name: str) -> str:
        return (self.folder / "deploy" / ".secrets" / name).read_text().strip()

    def compose(self, *arguments: str) -> str:
        """Runs a command of docker compose and returns its output."""
        return self.here().run(*self.command(arguments), cwd=self.folder).stdout

    def compose_step(self, title: str, log: str, *arguments: str) -> None:
        """Runs a slow command of docker compose, shown as a step."""
        self.here().step(title, log, *self.command(arguments), cwd=self.folder)

    def documented(self, section: str) -> None:
        """Runs the shell commands in a section of docs/operations.md."""
        document = (layout.ROOT / "docs" / "operations.md").read_text()
        text = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", document, re.M | re.S)[1]
        lines = [line[4:] for line in text.splitlines() if line.startswith("    ")]
        here = self.here()
        path = f"{os.path.dirname(here.docker)}:{os.environ['PATH']}"
        environment = {**here.environment, "PATH": path, "COMPOSE_PROJECT_NAME": self.name, "COMPOSE_PROFILES": "agent"}
        with Step(f"the commands of docs/operations.md, {section}") as step:
            script = ["bash", "-euxo", "pipefail", "-c", "\n".join(lines)]
            log = LOGS / f"{section.lower()}.log"
            processes.run(step, script, log, env=environment, cwd=self.folder, limit=STEP_LIMIT)
            step.done()

    def here(self) -> Engine:
        return Engine(self.engine.docker, {**self.engine.environment, **self.settings})

    def command(self, arguments) -> list:
        return ["compose", "--project-name", self.name, "--profile", "agent", *arguments]

    def start(self) -> None:
        """Starts all services but the agent, creates the agent's join token, and starts the agent."""
        wait = ["up", "--detach", "--wait", "--wait-timeout", "180", "--no-build"]
        without_agent = ["compose", "--project-name", self.name, *wait]
        self.here().step("docker compose up --wait", "up", *without_agent, cwd=self.folder)
        create = ["exec", "-T", "auth-svc", "vmwatch-auth", "join-token", "create", "--instances", INSTANCE]
        (self.folder / "deploy" / ".secrets" / "join-token").write_text(self.compose(*create))
        self.compose_step("docker compose --profile agent up --wait", "agent", *wait)

    def containers(self, service: str) -> List[str]:
        return self.compose("ps", "--quiet", "--no-trunc", service).split()

    def gateways(self) -> List[str]:
        """Returns the HOST:PORT of each gateway."""
        found = []
        for container in self.containers("gateway"):
            bindings = self.engine.inspect(container)["NetworkSettings"]["Ports"]["8086/tcp"]
            found.append(f"127.0.0.1:{bindings[0]['HostPort']}")
        return sorted(found)

    def wait_healthy(self, container: str) -> None:
        end = time.monotonic() + READY_LIMIT
        while self.engine.inspect(container)["State"]["Health"]["Status"] != "healthy":
            if time.monotonic() > end:
                raise Problem(f"a container was not healthy after {READY_LIMIT:.0f} s", self.logs())
            time.sleep(0.2)

    def logs(self) -> str:
        return self.compose("logs", "--no-color", "--tail", "30")

    def down(self) -> None:
        LOGS.mkdir(parents=True, exist_ok=True)
        (LOGS / "compose.log").write_text(self.compose("logs", "--no-color"))
        self.compose_step("docker compose down", "down", "down", "--volumes")
        shutil.rmtree(self.folder)


def run(engine: Engine, standins) -> int:
    """Runs all checks. Returns the exit code: 1 if a check failed."""
    checks = Checks()
    project = Project(engine, standins.variables)
    try:
        project.start()
        api = Api(project.gateways())
        documented_methods(checks, project, api)
        hardened(checks, project)
        closed(checks, project)
        backup_and_restore(checks, project, api)
        scale(checks, project, api)
        for service in ("metrics-svc", "auth-svc", "lifecycle-svc", "alert-svc"):
            rolling_restart(checks, project, service)
        gateways_in_turn(checks, project)
    except Problem:
        say(project.logs())
        raise
    finally:
        project.down()
    return checks.result()


class Checks:
    """Prints and counts the results of checks."""

    def __init__(self):
        self.passed, self.failed = 0, 0

    def that(self, passed: bool, what: str) -> None:
        if passed:
            self.passed += 1
            say(f"{style('ok', 'good')}  {what}")
        else:
            self.failed += 1
            say(f"{style('FAILED', 'bad')}  {what}")

    def result(self) -> int:
        say(f"\n{self.passed} passed, {self.failed} failed")
        return 1 if self.failed else 0


def documented_methods(checks: Checks, project: Project, api: Api) -> None:
    session = api.login("admin", project.secret("admin-password"))
    checks.that(bool(session), "login (458753) with the password that deploy/secrets created succeeds")
    checks.that(api.login("admin", "wrong") is None, "a wrong password is refused")
    for method, name, more in [
        (611611, "VM rows", {}),
        (611711, "process rows", {}),
        (611712, "process rows by name", {"proc_name": "vmwatch-agent"}),
    ]:
        rows = api.rows_within(30, session, method, INSTANCE, more)
        checks.that(bool(rows), f"{name} ({method}) of this machine, sampled by the agent's container: {len(rows)} rows")
    started = api.ask({"method": 32523, "session_id": session, "data": {"instance_id": machines.TO_START}})
    checks.that(started["status_code"] == 1, f"startmonitor (32523) starts a VM that is switched off: {started['message']}")
    missing = api.ask({"method": 32523, "session_id": session, "data": {"instance_id": "0" * 8}})
    checks.that(missing["status_code"] == 3, f"startmonitor refuses an unknown VM: {missing['message']}")


def hardened(checks: Checks, project: Project) -> None:
    """Checks the users, capabilities, file systems and shells of vmwatch's containers. Only the agent runs as root."""
    for service in ("gateway", "auth-svc", "metrics-svc", "lifecycle-svc", "alert-svc", "agent"):
        (container,) = project.containers(service)
        found = project.engine.inspect(container)
        user, expected = ("0:0", ["NET_ADMIN"]) if service == "agent" else ("65532:65532", [])
        capabilities = [name.removeprefix("CAP_") for name in found["HostConfig"]["CapAdd"] or []]
        safe = (
            found["Config"]["User"] == user
            and capabilities == expected
            and found["HostConfig"]["ReadonlyRootfs"]
            and found["HostConfig"]["CapDrop"] == ["ALL"]
        )
        having = " and ".join(expected) or "no capability"
        checks.that(safe, f"{service} runs as {user} with {having} and without a writable file system")
        shell = subprocess.run(
            [project.engine.docker, "exec", container, "/bin/sh", "-c", "true"],
            env=project.engine.environment, capture_output=True,
        )
        checks.that(shell.returncode != 0, f"{service} has no shell")


def closed(checks: Checks, project: Project) -> None:
    """Checks that NATS and MongoDB run without privileges and open only the ports that clients need."""
    for service, user, opened, shut in [("nats", "65532:65532", 4222, 8222), ("mongo", "999:999", 27017, None)]:
        (container,) = project.containers(service)
        found = project.engine.inspect(container)
        safe = (
            found["Config"]["User"] == user
            and found["HostConfig"]["ReadonlyRootfs"]
            and found["HostConfig"]["CapDrop"] == ["ALL"]
        )
        checks.that(safe, f"{service} runs without root, capabilities and a writable file system")
        address = next(iter(found["NetworkSettings"]["Networks"].values()))["IPAddress"]
        answers = accepts(address, opened) and not (shut and accepts(address, shut))
        checks.that(answers, f"{service} listens on {opened}" + (f", and not on {shut}" if shut else ""))


def accepts(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=2).close()
        return True
    except OSError:
        return False


def backup_and_restore(checks: Checks, project: Project, api: Api) -> None:
    """Runs the backup and restore commands of docs/operations.md while the programs are running."""
    password = project.secret("admin-password")
    before = api.login("admin", password)
    project.documented("Backup")
    after = api.login_within(READY_LIMIT, "admin", password)
    checks.that(bool(after), "a login after the backup succeeds")
    project.documented("Restore")
    checks.that(bool(api.login_within(READY_LIMIT, "admin", password)), "a login after the restore succeeds")
    rows = api.rows_within(READY_LIMIT, before, 611611, INSTANCE, {})
    checks.that(bool(rows), f"a session and the rows from before the backup still exist: {len(rows)} rows")
    over = api.ask({"method": 611611, "session_id": after, "data": {"instance_id": INSTANCE}})
    checks.that(over["status_code"] == 3, f"a session from after the backup has ended: {over['message']}")
    # The agent is unhealthy while it has no NATS, and `docker compose up --wait` fails if a container is unhealthy.
    for container in project.containers("agent"):
        project.wait_healthy(container)


def scale(checks: Checks, project: Project, api: Api) -> None:
    arguments = [part for service, count in SCALED.items() for part in ("--scale", f"{service}={count}")]
    title = "docker compose up --scale " + " ".join(f"{name}={count}" for name, count in SCALED.items())
    wait = ["up", "--detach", "--wait", "--wait-timeout", "120", "--no-build", "--no-recreate"]
    project.compose_step(title, "scale", *wait, *arguments)
    for service, count in SCALED.items():
        checks.that(len(project.containers(service)) == count, f"{count} replicas of {service} are healthy")
    session = api.login("admin", project.secret("admin-password"))
    for address in project.gateways():
        rows = Api([address]).rows(session, 611611, INSTANCE, {})
        checks.that(bool(rows), f"a session of one gateway is valid at {address}")


def rolling_restart(checks: Checks, project: Project, service: str) -> None:
    """Restarts the containers of a service one after the other, under load. Each must be healthy before the next is restarted."""
    password = project.secret("admin-password")
    with Load(project.gateways(), password, INSTANCE, machines.TO_START) as load:
        took = restart_each(project, service)
    checks.that(
        load.requests > 100 and not load.failures,
        f"rolling restart of {service} in {took:.1f} s: {load.summary()}",
    )


def gateways_in_turn(checks: Checks, project: Project) -> None:
    """Restarts the gateways under load. A client whose connection is refused or closed uses the other gateway, as it would
    behind a load balancer."""
    password = project.secret("admin-password")
    with Load(project.gateways(), password, INSTANCE, machines.TO_START) as load:
        took = restart_each(project, "gateway")
    checks.that(
        load.requests > 100 and not load.failures,
        f"rolling restart of gateway in {took:.1f} s: {load.summary()}, {load.retried} repeated on the other gateway",
    )


def restart_each(project: Project, service: str) -> float:
    began = time.monotonic()
    with Step(f"restarting each {service} under load") as step:
        for container in project.containers(service):
            project.engine.run("restart", "--time", "45", container)
            project.wait_healthy(container)
            step.tick()
        step.done()
    return time.monotonic() - began
