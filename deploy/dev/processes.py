"""Starts, stops and identifies processes, safely even if pids are reused, and runs commands with a progress line."""

import contextlib
import os
import re
import select
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Optional

from . import layout
from .terminal import Problem, Step

TICK = 0.1
# Number of output lines of a failed command that are shown.
SHOWN_LINES = 40


def parse_stat(text: str):
    """Returns the state and the start time (in clock ticks since boot) from /proc/<pid>/stat: fields 3 and 22 of proc(5).

    The second field, the process name in parentheses, may itself contain spaces and parentheses.
    """
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[19])


@dataclass(frozen=True)
class Identity:
    """Identifies a process uniquely: a pid can be reused, but not with the same start time since the same boot."""

    pid: int
    start: int
    boot: str

    @classmethod
    def of(cls, pid: int) -> Optional["Identity"]:
        """Returns the identity of the process with this pid, or None if there is no such process or it is a zombie."""
        try:
            state, start = parse_stat(Path(f"/proc/{pid}/stat").read_text(errors="replace"))
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except (OSError, ValueError, IndexError):
            return None
        return None if state in "ZX" else cls(pid, start, boot)

    def alive(self) -> bool:
        return Identity.of(self.pid) == self

    def send(self, number: int) -> None:
        """Sends a signal to this process, never to another one with the same pid. Does nothing if the process has ended."""
        with contextlib.suppress(ProcessLookupError):
            try:
                handle = os.pidfd_open(self.pid)
            except (AttributeError, PermissionError, OSError):
                # Without pidfd (Linux before 5.3), the pid could be reused between the check and the signal.
                if self.alive():
                    os.kill(self.pid, number)
                return
            try:
                # The pidfd refers to the process that has the pid now. Therefore the identity is checked after the
                # pidfd was opened.
                if self.alive():
                    signal.pidfd_send_signal(handle, number)
            finally:
                os.close(handle)

    def wait(self, limit: float) -> bool:
        """Waits for the process to end. Returns whether it did within `limit` seconds."""
        return wait_for(lambda: not self.alive(), limit)


def wait_for(condition: Callable[[], bool], limit: float) -> bool:
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)
    return True


def spawn(argv, env, log: Path) -> subprocess.Popen:
    """Starts a program in a new session, so Ctrl-C in the terminal reaches only ./dev."""
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists():
        log.replace(log.with_suffix(".log.1"))
    with open(log, "wb") as out:
        return subprocess.Popen(
            [str(part) for part in argv],
            env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
        )


def ended_how(code: int) -> str:
    if code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def tail(path: Path, lines: int) -> str:
    """Returns the last lines of a file, but at most its last 64 KiB."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 65536))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def run(
    step: Step, argv, log: Path, describe=lambda line: line, env=None, cwd=None, limit: Optional[float] = None
) -> None:
    """Runs a command to completion and writes its output to `log`. `describe` converts the newest output line into the
    text of the progress line.

    Raises a Problem if the command fails, or if it exceeds `limit` seconds and is killed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    argv = [str(part) for part in argv]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with open(log, "w") as out, subprocess.Popen(argv, env=env, cwd=cwd, **pipes) as child:
        try:
            in_time = _follow(step, child.stdout.fileno(), out, describe, limit)
            if not in_time:
                child.kill()
        except BaseException:
            # A command that was started by sudo receives Ctrl-C from the terminal, but this process may not send it a
            # signal.
            with contextlib.suppress(PermissionError):
                child.terminate()
            raise
    if child.returncode != 0:
        shown = tail(log, SHOWN_LINES)
        how = f"failed with {ended_how(child.returncode)}" if in_time else f"timed out after {limit:.0f} s"
        raise Problem(
            f"`{' '.join(argv)}` {how}",
            f"Its last lines:\n\n{shown}\n\nFull output: {layout.short(log)}",
        )


def _follow(step: Step, pipe: int, out, describe, limit: Optional[float]) -> bool:
    """Reads the command's output to its end. Returns False if `limit` seconds pass first.

    A progress bar redraws its line; only its final state is written to the log.
    """
    detail, rest = "", b""
    end = time.monotonic() + limit if limit else float("inf")
    while time.monotonic() < end:
        if select.select([pipe], [], [], TICK)[0]:
            chunk = os.read(pipe, 65536)
            *lines, rest = re.split(rb"(?<=[\r\n])", rest + chunk)
            for line in [*lines, b"" if chunk else rest]:
                text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line.decode(errors="replace")).rstrip("\r\n")
                if not line.endswith(b"\r") and text:
                    out.write(f"{text}\n")
                detail = describe(text.strip()) or detail
            if not chunk:
                return True
        step.tick(detail)
    return False
