"""Prints how to use a stack after `up`. It first waits for rows, so the printed `curl` commands return some."""

import json
import os
import shlex
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from . import bus, layout, machines, ports, processes
from .hypervisor import Hypervisor
from .state import State
from .terminal import Step, say, style, table, warn

PATH = "/wsgi_app.py"
LOGIN, VM_ROWS, PROCESS_ROWS, NAMED_ROWS, START = 458753, 611611, 611711, 611712, 32523

ROWS_LIMIT = 60.0


def post(state: State, request: dict) -> dict:
    """Sends a request of the documented API. Returns {} if the answer is missing or not JSON."""
    # The request bypasses any proxy that is configured in the environment.
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
    """Waits for this machine's first rows, or warns why there are none."""
    session = login(state, password)
    if not session.get("session_id"):
        warn(
            f"`{state.admin}` cannot log in with the password in {layout.short(layout.PASSWORD)}: "
            f"{session.get('message', 'no answer')}\n"
            "Either the database already contained this administrator, or the password was changed."
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
    """Returns a curl command for the documented API, with the session token taken from a shell variable."""
    body = f'{{"method":{method},"data":{{"instance_id":"{instance}"}},"session_id":"\'$session\'"{more}}}'
    return _curl(state, f"'{body}'")


def _curl_line(state: State, method: int, instance: str, more: str = "") -> str:
    return _request(state, method, instance, more) + "; echo"


def session_lines(state: State, password: str, binaries: Path) -> list:
    """Returns shell commands with their titles, to be pasted in this order."""
    request = json.dumps(
        {"method": LOGIN, "data": {"user_name": state.admin, "password": password}}, separators=(",", ":")
    )
    capture = r"""sed -n 's/.*"session_id":"\([^"]*\)".*/\1/p'"""
    lines = [
        ("log in and store the session token", f"session=$({_curl(state, shlex.quote(request))} | {capture})"),
        ("this machine's newest row", _curl_line(state, VM_ROWS, state.instance, ',"limit":1')),
        ("four processes of this machine", _curl_line(state, PROCESS_ROWS, state.instance, ',"limit":4')),
    ]
    lines += _command_line(state, binaries)
    # The programs that the user runs take the login to their own NATS server from the environment.
    login = {} if os.environ.get("VMWATCH_NATS_URL") else bus.login("vmwatch-operator")
    settings = {"VMWATCH_NATS_URL": state.nats, **login}
    words = [f"{name}={shlex.quote(value)}" for name, value in settings.items()]
    reading = " ".join([*words, shlex.quote(str(binaries / "vmwatch-lifecycle"))])
    # Commands that start VMs are not printed if the user has configured hypervisors.
    if not os.environ.get("VMWATCH_HYPERVISORS"):
        lines += [
            ("start a VM that is switched off", _curl_line(state, START, machines.TO_START)),
            ("read its state over the bus", f"{reading} state {machines.TO_START}"),
        ]
    return lines + (_guest_lines(state, state.hypervisor) if state.hypervisor else [])


def _command_line(state: State, binaries: Path) -> list:
    """Returns commands of `vmwatch`, which keeps its session in .dev/. It accepts a gateway without TLS only on this machine."""
    if urllib.parse.urlsplit(state.gateway).hostname not in (ports.LOOPBACK, "::1", "localhost"):
        return []
    program = shlex.quote(str(binaries / "vmwatch"))
    config, password = shlex.quote(str(layout.DOT / "vmwatch.toml")), shlex.quote(str(layout.PASSWORD))
    login = f"{program} login {state.gateway} --user {shlex.quote(state.admin)} --password-file {password}"
    return [
        ("sign in at the command line", f"export VMWATCH_CONFIG={config}; {login}"),
        ("the processes of this machine, live (q quits)", f"{program} top {state.instance}"),
    ]


def _guest_lines(state: State, own: Hypervisor) -> list:
    """Returns shell commands that start the real VM and read its rows. Without an agent, they are libvirt's measures."""
    first = _request(state, VM_ROWS, own.instance, ',"limit":1')
    lines = [
        ("start the guest, a real VM in QEMU", f"posted=$(date +%s%N); {_curl_line(state, START, own.instance)}"),
        ("read the guest's state from libvirt", f"virsh --connect {shlex.quote(own.uri)} domstate {own.instance}"),
        (
            "wait for the guest's first row and print the time since the start request",
            f"until {first} | grep ObjectId; do sleep 0.1; done; "
            'echo "first row after $(( ($(date +%s%N) - posted) / 1000000 )) ms"',
        ),
    ]
    if own.with_agent:
        named = ',"proc_name":"vmwatch-agent","limit":1'
        lines.append(("read the row of the guest's agent process", _curl_line(state, NAMED_ROWS, own.instance, named)))
    return [*lines, ("show the guest's console output", f"cat {shlex.quote(str(own.console))}")]


def show(state: State, password: str, database: str, binaries: Path, detached: bool) -> None:
    say()
    say(style(f"vmwatch is up: {state.gateway}{PATH}", "strong"))
    say()
    rows = [
        ("web page", f"{state.gateway}/"),
        ("administrator", state.admin),
        ("initial password", f"{password}  (also in {layout.short(layout.PASSWORD)})"),
        ("this machine", f"{state.instance}  (instance_id)"),
        ("alerts", "the starter rules notify nobody until there is a channel; see docs/alerts.md"),
        ("bus", state.nats),
        ("database", database),
        ("data and logs", layout.short(layout.DOT)),
    ]
    if state.hypervisor:
        agent = "" if state.hypervisor.with_agent else " without an agent"
        rows.insert(3, ("guest", f"{state.hypervisor.instance}  (a VM in QEMU{agent}, switched off)"))
    say(table([("  " + name, value) for name, value in rows]))
    say()
    for title, line in session_lines(state, password, binaries):
        say(f"  {style('# ' + title, 'faint')}")
        say(f"  {line}")
    say()
    if detached:
        say("The stack runs in the background: ./dev status, ./dev logs [service] [-f], ./dev down.")
    else:
        say("Ctrl-C stops the stack; its data stays in .dev/. In another terminal: ./dev status, ./dev logs.")
