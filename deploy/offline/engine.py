"""Provides a Docker engine: the one that is running, otherwise Debian's, which is started and stopped by this module."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List, Optional

from dev import apt, layout, processes, tools
from dev.terminal import Problem, Step, note

LOGS = layout.LOGS / "offline"
# The first Debian release with version 2 of Docker Compose.
COMPOSE_SUITE = "forky"
START_LIMIT = 60.0
# Time limit for stopping containers, in seconds. It exceeds the grace period of each of our containers.
STOP_LIMIT = 60.0
# Time limits in seconds: for a query, and for a command that builds, starts or restarts something.
ASK_LIMIT = 90.0
STEP_LIMIT = 300.0
# Total size of the build layers that are kept in an engine that was started by this module.
KEPT_LAYERS = "1GB"
# Images with this label are removed at the end if they no longer have a name.
LABEL = "vmwatch-offline"


@dataclass(frozen=True)
class Engine:
    """The Docker client program and the environment to run it in."""

    docker: str
    environment: Dict[str, str]

    @classmethod
    @contextlib.contextmanager
    def answering(cls) -> Iterator["Engine"]:
        """Yields a running Docker engine with compose. Stops the engine at the end if it was started here."""
        install()
        engine = cls(client(), {**os.environ, "DOCKER_BUILDKIT": "1"})
        started = None if engine.answers() else start(engine)
        try:
            yield engine.with_compose()
        finally:
            if started:
                try:
                    engine.tidy()
                finally:
                    stop(started)

    def answers(self) -> bool:
        command = [self.docker, "info"]
        try:
            return subprocess.run(command, env=self.environment, capture_output=True, timeout=ASK_LIMIT).returncode == 0
        except subprocess.TimeoutExpired:
            return False

    def tidy(self) -> None:
        """Removes images and layers of earlier builds, so the folder of the engine does not grow with each run."""
        with Step("removing images of earlier runs") as step:
            self.run("image", "prune", "--force", "--filter", f"label={LABEL}")
            self.run("builder", "prune", "--force", "--keep-storage", KEPT_LAYERS)
            step.done()

    def run(self, *arguments, **options) -> subprocess.CompletedProcess:
        """Runs a command and captures its output. If it fails, raises a Problem with its error output."""
        argv = [self.docker, *(str(argument) for argument in arguments)]
        try:
            done = subprocess.run(
                argv, env=self.environment, capture_output=True, text=True, timeout=ASK_LIMIT, **options
            )
        except subprocess.TimeoutExpired:
            raise Problem(f"`{' '.join(argv)}` timed out after {ASK_LIMIT:.0f} s") from None
        if done.returncode != 0:
            raise Problem(f"`{' '.join(argv)}` ended with {processes.ended_how(done.returncode)}", done.stderr.strip())
        return done

    def step(self, title: str, log: str, *arguments, cwd: Optional[Path] = None, result: str = "") -> float:
        """Runs a slow command, shows it as a step, and returns its duration in seconds."""
        with Step(title) as step:
            argv = [self.docker, *arguments]
            processes.run(step, argv, LOGS / f"{log}.log", env=self.environment, cwd=cwd, limit=STEP_LIMIT)
            step.done(result)
            return step.elapsed()

    def has_image(self, tag: str) -> bool:
        return subprocess.run([self.docker, "image", "inspect", tag], env=self.environment, capture_output=True).returncode == 0

    def inspect(self, container: str) -> dict:
        return json.loads(self.run("inspect", container).stdout)[0]

    def with_compose(self) -> "Engine":
        """Returns the engine with `docker compose`, which is downloaded from Debian into the cache of ./dev if it is missing."""
        has = subprocess.run([self.docker, "compose", "version"], env=self.environment, capture_output=True)
        if has.returncode == 0:
            return self
        home = tools.layout.tools() / "docker-compose"
        plugin = home / "cli-plugins" / "docker-compose"
        if not plugin.exists():
            with tools.installing():
                partial = home.with_name(".docker-compose.partial")
                shutil.rmtree(partial, ignore_errors=True)
                unpacked = apt.fetch("docker-compose", COMPOSE_SUITE, partial, LOGS / "docker-compose.log")
                plugin.parent.mkdir(parents=True, exist_ok=True)
                (unpacked / "usr/libexec/docker/cli-plugins/docker-compose").rename(plugin)
                shutil.rmtree(partial)
        return Engine(self.docker, {**self.environment, "DOCKER_CONFIG": str(home)})


def install() -> None:
    """Installs Docker and debootstrap if they are missing."""
    needs = [
        tools.Need("docker.io", "Docker", lambda: bool(shutil.which("dockerd") or shutil.which("docker"))),
        tools.Need("debootstrap", "debootstrap", lambda: bool(shutil.which("debootstrap"))),
    ]
    tools.install_system(needs)
    if not shutil.which("dockerd") and not Engine(client(), dict(os.environ)).answers():
        # Only a Docker client is installed, and no engine answers it.
        apt.install(["docker.io"], LOGS / "apt.log")


def client() -> str:
    """Returns the path of the Docker client. Debian's is preferred, because it has the same version as the engine and
    includes BuildKit without a plugin."""
    debian = "/usr/bin/docker"
    return debian if os.path.exists(debian) else shutil.which("docker") or debian


def start(engine: Engine) -> subprocess.Popen:
    if os.geteuid() != 0:
        raise Problem("no Docker engine answers, and only root can start one", "Start Docker, or run this as root.")
    note("No Docker engine answers: starting one, which will be stopped at the end.")
    with Step("starting dockerd") as step:
        child = processes.spawn(["dockerd"], dict(os.environ), LOGS / "dockerd.log")
        if not processes.wait_for(lambda: engine.answers() or child.poll() is not None, START_LIMIT) or child.poll() is not None:
            child.kill()
            raise Problem("dockerd did not start", processes.tail(LOGS / "dockerd.log", processes.SHOWN_LINES))
        step.done()
    return child


def stop(child: subprocess.Popen) -> None:
    with Step("stopping dockerd") as step:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        step.done()


def containers(engine: Engine, *filters: str) -> List[str]:
    """Returns the ids of the running containers that match the filters."""
    arguments = [part for text in filters for part in ("--filter", text)]
    return engine.run("ps", "--quiet", "--no-trunc", *arguments).stdout.split()
