"""What `up` tells at its end: the first rows are awaited, so that the `curl` lines that it prints answer with rows."""

import json
import os
import shlex
import time
import urllib.error
import urllib.request
from pathlib import Path

from . import layout, machines, processes
from .hypervisor import Hypervisor
from .state import State
from .terminal import Step, say, style, table, warn

PATH = "/wsgi_app.py"
LOGIN, VM_ROWS, PROCESS_ROWS, NAMED_ROWS, START = 458753, 611611, 611711, 611712, 32523

ROWS_LIMIT = 60.0


def post(state: State, request: dict) -> dict:
    """One request of the documented API; {} where no answer can be read."""
    # Straight to the gateway, whatever proxy the environment names.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(state.gateway + PATH, json.dumps(request).encode(), timeout=10) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        try:
            return json.load(error)
        except ValueError:
            return {}
    except (OSError, ValueError):
        return {}


def login(state: State, password: str) -> dict:
    return post(state, {"method": LOGIN, "data": {"user_name": state.admin, "password": password}})


def await_rows(state: State, password: str) -> None:
    """Waits until this machine's first rows can be read, or says why they cannot."""
    session = login(state, password)
    if not session.get("session_id"):
        warn(
            f"`{state.admin}` cannot log in with the password in {layout.short(layout.PASSWORD)}: "
            f"{session.get('message', 'no answer')}\n"
            "The database has an administrator of an earlier time, or the password was changed since."
        )
        return
    with Step("waiting for this machine's first rows") as step:
        for what, method in (("its VM row", VM_ROWS), ("its process rows", PROCESS_ROWS)):
            request = {
                "method": method, "limit": 1, "session_id": session["session_id"],
                "data": {"instance_id": state.instance},
            }
            while not post(state, request).get("data"):
                if step.elapsed() > ROWS_LIMIT:
                    step.failed()
                    warn(f"The agent has not reported {what}; see ./dev logs agent metrics")
                    return
                step.tick(what)
                time.sleep(processes.TICK)
        step.done()


def _curl(state: State, request: str) -> str:
    return f"curl -s {state.gateway}{PATH} -d {request}"


def _request(state: State, method: int, instance: str, more: str = "") -> str:
    """A request in the document's form, the session from the shell's variable."""
    body = f'{{"method":{method},"data":{{"instance_id":"{instance}"}},"session_id":"\'$session\'"{more}}}'
    return _curl(state, f"'{body}'")


def _asking(state: State, method: int, instance: str, more: str = "") -> str:
    return _request(state, method, instance, more) + "; echo"


def session_lines(state: State, password: str, binaries: Path) -> list:
    """Title and line, to be pasted into a shell in this order."""
    request = json.dumps(
        {"method": LOGIN, "data": {"user_name": state.admin, "password": password}}, separators=(",", ":")
    )
    capture = r"""sed -n 's/.*"session_id":"\([^"]*\)".*/\1/p'"""
    lines = [
        ("log in, and keep the session", f"session=$({_curl(state, shlex.quote(request))} | {capture})"),
        ("this machine's newest row", _asking(state, VM_ROWS, state.instance, ',"limit":1')),
        ("four of its processes", _asking(state, PROCESS_ROWS, state.instance, ',"limit":4')),
    ]
    reading = f"VMWATCH_NATS_URL={state.nats} {shlex.quote(str(binaries / 'vmwatch-lifecycle'))}"
    # What others named is not ours to start for a demonstration.
    if not os.environ.get("VMWATCH_HYPERVISORS"):
        lines += [
            ("start a VM that is shut off", _asking(state, START, machines.TO_START)),
            ("and read its state back through the bus", f"{reading} state {machines.TO_START}"),
        ]
    return lines + (_guest_lines(state, state.hypervisor) if state.hypervisor else [])


def _guest_lines(state: State, own: Hypervisor) -> list:
    """A real VM: it boots, and what it then sees inside comes back."""
    first = _request(state, VM_ROWS, own.instance, ',"limit":1')
    return [
        ("start the guest, a real VM of QEMU", f"posted=$(date +%s%N); {_asking(state, START, own.instance)}"),
        ("what libvirt says of it", f"virsh --connect {shlex.quote(own.uri)} domstate {own.instance}"),
        (
            "wait for its first row, and tell how long after the POST it came",
            f"until {first} | grep ObjectId; do sleep 0.1; done; "
            'echo "first row after $(( ($(date +%s%N) - posted) / 1000000 )) ms"',
        ),
        (
            "its agent, as one of the processes in it",
            _asking(state, NAMED_ROWS, own.instance, ',"proc_name":"vmwatch-agent","limit":1'),
        ),
        ("what it wrote on its console", f"cat {shlex.quote(str(own.console))}"),
    ]


def show(state: State, password: str, database: str, binaries: Path, detached: bool) -> None:
    say()
    say(style(f"vmwatch is up: {state.gateway}{PATH}", "strong"))
    say()
    rows = [
        ("the page", f"{state.gateway}/"),
        ("administrator", state.admin),
        ("first password", f"{password}  (also in {layout.short(layout.PASSWORD)})"),
        ("this machine", f"{state.instance}  (its instance_id)"),
        ("bus", state.nats),
        ("database", database),
        ("data and logs", layout.short(layout.DOT)),
    ]
    if state.hypervisor:
        rows.insert(3, ("guest", f"{state.hypervisor.instance}  (a VM of QEMU, off)"))
    say(table([("  " + name, value) for name, value in rows]))
    say()
    for title, line in session_lines(state, password, binaries):
        say(f"  {style('# ' + title, 'faint')}")
        say(f"  {line}")
    say()
    if detached:
        say("It goes on in the background: ./dev status, ./dev logs [service] [-f], ./dev down.")
    else:
        say("Ctrl-C stops it; what it stored stays under .dev/. In another terminal: ./dev status, ./dev logs.")
