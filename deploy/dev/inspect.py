"""The commands `status`, `logs` and `down` of ./dev."""

import contextlib
import json
import re
import signal
import sys
import time
from pathlib import Path
from typing import Optional

from . import interrupts, layout, processes, stack, state
from .state import State
from .terminal import EX_USAGE, Problem, say, style, table

FOLLOW_INTERVAL = 0.25
LINES = 20


def status(arguments) -> int:
    """Shows the running programs and their state. The exit code is 0 only if all are ready."""
    if arguments not in ([], ["--json"]):
        raise Problem("`status` takes only --json", code=EX_USAGE)
    current = state.load()
    up = bool(current.living())
    services = [_service(program) for program in current.programs] if up else []
    if arguments:
        print(json.dumps(_report(current, services), indent=2))
    elif up:
        _show(current, services)
    elif current.guard and current.guard.alive():
        say(f"./dev up (pid {current.guard.pid}) has not started any program yet.")
    else:
        say("Nothing is running. Start a stack with ./dev up.")
    return 0 if up and all(service["state"] == "ready" for service in services) else 1


def _service(program) -> dict:
    how, reason = stack.health_of(program)
    return {
        "name": program.name, "pid": program.process.pid, "state": how, "reason": reason,
        "address": program.address, "health": program.health, "log": program.log,
    }


def _report(current: State, services: list) -> dict:
    return {
        "running": bool(services),
        "api": f"{current.gateway}/wsgi_app.py" if services else None,
        "gateway": current.gateway if services else None,
        "nats": current.nats if services else None,
        "database": current.database if services else None,
        "admin_user": current.admin or None,
        "admin_password_file": str(layout.PASSWORD) if layout.PASSWORD.exists() else None,
        "instance_id": current.instance or None,
        "guest": _guest(current) if services else None,
        "detached": current.detached,
        "services": services,
    }


def _guest(current: State) -> Optional[dict]:
    """Describes the VM that `up --guest` created, or returns None."""
    own = current.hypervisor
    if not own:
        return None
    qemu = own.qemu()
    return {
        "instance_id": own.instance, "pid": qemu.pid if qemu else None, "libvirt": own.uri, "console": str(own.console),
    }


def _show(current: State, services: list) -> None:
    rows = [("SERVICE", "PID", "STATE", "ADDRESS", "HEALTH")]
    styles = {0: "strong"}
    for index, service in enumerate(services, start=1):
        state_text = f"{service['state']}: {service['reason']}" if service["reason"] else service["state"]
        cells = (str(service["pid"]), state_text, service["address"] or "-", service["health"] or "-")
        rows.append((service["name"], *cells))
        if service["state"] != "ready":
            styles[index] = "bad"
    say(table(rows, styles))
    say()
    facts = [
        ("API", f"{current.gateway}/wsgi_app.py"),
        ("bus", current.nats),
        ("administrator", f"{current.admin}, initial password in {layout.short(layout.PASSWORD)}"),
        ("this machine", current.instance),
    ]
    guest = _guest(current)
    if guest:
        how = f"on, QEMU has pid {guest['pid']}" if guest["pid"] else "off"
        facts.append(("guest", f"{guest['instance_id']}  {how}"))
    say(table(facts))


def logs(arguments) -> int:
    """Shows the last lines of every log, or the named services' whole logs. -f follows them."""
    follow = "-f" in arguments
    names = [argument for argument in arguments if argument != "-f"]
    known = sorted(path.stem for path in layout.LOGS.glob("*.log"))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise Problem(
            f"there is no log named `{unknown[0]}`",
            f"Available: {', '.join(known)}." if known else "No stack has been started yet; run ./dev up.",
            EX_USAGE if known else 1,
        )
    chosen = names or [program.name for program in state.load().programs] or known
    width = max((len(name) for name in chosen), default=0)
    prefix = {name: style(f"{name.ljust(width)} | ", "faint") if len(chosen) > 1 else "" for name in chosen}
    with contextlib.suppress(KeyboardInterrupt):
        files = {name: _show_log(layout.LOGS / f"{name}.log", prefix[name], whole=bool(names)) for name in chosen}
        while follow:
            for name, at in files.items():
                files[name] = _show_new(layout.LOGS / f"{name}.log", at, prefix[name])
            time.sleep(FOLLOW_INTERVAL)
    return 0


def _show_log(path: Path, prefix: str, whole: bool) -> int:
    """Prints a log or its last lines. Returns the position up to which the log was read."""
    if whole:
        return _show_new(path, 0, prefix)
    end = path.stat().st_size
    for line in processes.tail(path, LINES).splitlines():
        say(prefix + _plain(line))
    return end


def _show_new(path: Path, at: int, prefix: str) -> int:
    """Prints the complete lines after position `at` and returns the new position. A truncated log is read from its start."""
    try:
        with open(path, "rb") as file:
            if path.stat().st_size < at:
                at = 0
            file.seek(at)
            new, newline, _ = file.read().rpartition(b"\n")
    except OSError:
        return 0
    for line in new.decode(errors="replace").splitlines() if newline else []:
        print(prefix + _plain(line))
    sys.stdout.flush()
    return at + len(new) + len(newline)


def _plain(line: str) -> str:
    """Replaces control characters; log lines may contain them, because they can quote a client's input."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "?", line)


def down(arguments) -> int:
    """Stops the stack of this checkout."""
    if arguments:
        raise Problem("`down` takes no arguments", code=EX_USAGE)
    interrupts.install()
    current = state.load()
    if current.guard and current.guard.alive():
        # The `./dev up` that runs in the foreground stops the stack, as on Ctrl-C.
        current.guard.send(signal.SIGTERM)
        limit = len(stack.STOP_ORDER) * stack.STOP_LIMIT
        if not current.guard.wait(limit):
            raise Problem(f"./dev up (pid {current.guard.pid}) did not end within {limit:.0f} s")
        say("Stopped.")
        return 0
    with state.only_one():
        current = state.load()
        if not current.living():
            say("Nothing is running.")
            return 0
        stack.stop(current)
    say("Stopped. The data stays in .dev/.")
    return 0
