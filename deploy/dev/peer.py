"""`peer`: the tests of a driver against the real system that it speaks with, installed and started here."""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from . import cargo, checks, interrupts, layout, ports, processes, venv
from .processes import Identity
from .terminal import EX_USAGE, Problem, Step, say, style

SOURCES = layout.ROOT / "deploy" / "peers" / "nova"
# What Nova 34 and Keystone 30 ask for.
LEAST = (3, 11)
# Keystone makes its database, and Nova its: half a minute each on two cores that do nothing else.
READY_LIMIT = 300.0
STOP_LIMIT = 10.0


def peer(arguments) -> int:
    """OpenStack's own Keystone and Nova, with its fake compute driver; arguments go to the test runner."""
    if arguments[:1] != ["nova"]:
        raise Problem("`peer` knows only `peer nova`", code=EX_USAGE)
    cargo.check()
    environment = checks.servers()
    python = venv.environment("openstack", SOURCES / "requirements.txt", LEAST, "") / "bin" / "python"
    interrupts.install()
    # The passwords of a moment are in it: for this user only, and gone at the end.
    with tempfile.TemporaryDirectory(prefix="vmwatch-nova-") as folder, contextlib.ExitStack() as running:
        environment["VMWATCH_TEST_NOVA"] = str(_start(python, Path(folder), running))
        runner = ["cargo", "test", "--package", "lifecycle-svc", "--test", "lifecycle", "--", "nova_either", *arguments[1:]]
        say(f"\n{style('tests', 'strong')}: {' '.join(runner)}")
        return subprocess.run(runner, cwd=layout.ROOT, env=environment).returncode


def _start(python: Path, folder: Path, running: contextlib.ExitStack) -> Path:
    """Starts both; where Nova wrote what a client needs."""
    port = ports.choose(["keystone", "nova"], {}, str(layout.DOT))
    compute = f"http://{ports.LOOPBACK}:{port['nova']}/v2.1"
    identity, cloud = folder / "identity.json", folder / "cloud.json"
    for name, written, more in (("keystone", identity, [compute]), ("nova", cloud, [])):
        # They end with this process, should it be killed.
        argv = ["setpriv", "--pdeathsig", "TERM", "--"]
        argv += [python, SOURCES / f"serve_{name}.py", folder, port[name], *more]
        log = layout.LOGS / "peer" / f"{name}.log"
        with Step(f"starting {name}") as step:
            # Between its start and its entry here nothing may interrupt, or nobody would stop it.
            with interrupts.held_back():
                # Their warnings are of how they are written, and not of what they do here.
                child = processes.spawn(argv, {**os.environ, "PYTHONWARNINGS": "ignore"}, log)
                running.callback(_stop, child)
            while not written.exists():
                if child.poll() is not None or step.elapsed() > READY_LIMIT:
                    told = "did not become ready" if child.poll() is None else processes.ended_how(child.returncode)
                    raise Problem(f"{name}: {told}", processes.tail(log, processes.SHOWN_LINES))
                step.tick()
                time.sleep(processes.TICK)
            step.done()
    return cloud


def _stop(child: subprocess.Popen) -> None:
    identity = Identity.of(child.pid)
    if identity:
        identity.send(signal.SIGTERM)
    try:
        child.wait(STOP_LIMIT)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
