"""A container with Debian and systemd as its first process, in which packages are installed and units run."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from dev import apt, layout, processes, tools
from dev.terminal import Step

# systemd, what its units and the scripts of packages need, and the program that fetches the install script.
PACKAGES = "systemd,systemd-sysv,init-system-helpers,curl"
PATIENCE = 60.0
ENVIRONMENT = ["env", "--ignore-environment", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"]


def tree() -> Path:
    """Returns a folder with Debian and systemd, which is made once in the cache of ./dev."""
    release = apt.codename()
    made = layout.tools() / f"debian-{release}-systemd-curl"
    with tools.installing():
        if not made.exists():
            partial = made.with_name(f".{made.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            mirror = next(source.uri for source in apt.sources() if source.serves_release(release))
            command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", release, partial, mirror]
            with Step(f"making a tree of Debian {release} with systemd (debootstrap)") as step:
                processes.run(step, command, layout.LOGS / "debootstrap-systemd.log")
                step.done()
            shutil.rmtree(partial / "var/cache/apt")
            partial.rename(made)
    return made


class Container:
    """A running container. Changes to its files are lost when it stops."""

    def __init__(self, shared: Path, private_network: bool = True):
        """Starts a container in which the folder `shared` is /shared. It has a network of its own, or that of this machine."""
        network = ["--private-network"] if private_network else []
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [
                "systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--volatile=overlay", *network,
                f"--directory={tree()}", f"--bind-ro={shared}:/shared", "--boot",
            ],
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT,
        )
        try:
            self._init = self.eventually("the container has a first process", self._first_process)
            self.eventually("systemd has started", lambda: self.state() in ("running", "degraded"))
        except BaseException:
            self.stop()
            raise

    def state(self) -> str:
        return self.run("systemctl", "is-system-running", check=False).stdout.strip()

    def _first_process(self):
        """Returns the pid of the process that has pid 1 in the container, or None before it exists."""
        for pid in _descendants(self._process.pid):
            try:
                status = Path(f"/proc/{pid}/status").read_text()
            except OSError:
                continue
            numbers = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[1:]
            if len(numbers) > 1 and numbers[-1] == "1":
                return pid
        return None

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess:
        """Runs a command in the container."""
        full = ["nsenter", "--target", str(self._init), "--all", *ENVIRONMENT, *command]
        done = subprocess.run(full, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE)
        if check and done.returncode != 0:
            raise AssertionError(f"{' '.join(command)} failed with {done.returncode}:\n{done.stdout}")
        return done

    def write(self, path: str, text: str) -> None:
        self.run("sh", "-c", 'printf %s "$1" > "$2"', "sh", text, path)

    def property(self, unit: str, name: str) -> str:
        return self.run("systemctl", "show", "--property", name, "--value", unit).stdout.strip()

    def eventually(self, what: str, holds):
        """Waits until the function returns something true, and returns it."""
        end = time.monotonic() + PATIENCE
        while True:
            found = holds()
            if found:
                return found
            ended = self._process.poll() is not None
            if ended or time.monotonic() > end:
                self._log.seek(0)
                raise AssertionError(f"not within {PATIENCE:.0f} s: {what}\n{self._log.read().decode(errors='replace')}")
            time.sleep(0.05)

    def stop(self) -> None:
        # systemd-nspawn then lets systemd shut the container down.
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def _descendants(pid: int) -> list:
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return children + [one for child in children for one in _descendants(child)]


def possible() -> bool:
    """Whether this user can start containers."""
    return os.geteuid() == 0 and apt.is_here()
