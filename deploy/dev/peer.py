"""`peer`: tests a driver against the real system, which it installs and starts."""

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
# Required by Nova 34 and Keystone 30.
LEAST = (3, 11)
# Creating the databases takes Keystone and Nova about half a minute each on two idle cores.
READY_LIMIT = 300.0
STOP_LIMIT = 10.0


def peer(arguments) -> int:
    """Tests the Nova driver against OpenStack's Keystone and Nova with its fake compute driver.

    Remaining arguments go to the test runner.
    """
    if arguments[:1] != ["nova"]:
        raise Problem("`peer` supports only `peer nova`", code=EX_USAGE)
    cargo.check()
    environment = checks.servers()
    python = venv.environment("openstack", SOURCES / "requirements.txt", LEAST, "") / "bin" / "python"
    interrupts.install()
    # The folder contains temporary passwords: only this user can read it, and it is deleted at the end.
    with tempfile.TemporaryDirectory(prefix="vmwatch-nova-") as folder, contextlib.ExitStack() as running:
        environment["VMWATCH_TEST_NOVA"] = str(_start(python, Path(folder), running))
        runner = ["cargo", "test", "--package", "lifecycle-svc", "--test", "lifecycle", "--", "nova_either", *arguments[1:]]
        say(f"\n{style('tests', 'strong')}: {' '.join(runner)}")
        return subprocess.run(runner, cwd=layout.ROOT, env=environment).returncode


def _start(python: Path, folder: Path, running: contextlib.ExitStack) -> Path:
    """Starts Keystone and Nova. Returns the file with a client's configuration, which Nova writes."""
    port = ports.choose(["keystone", "nova"], {}, str(layout.DOT))
    compute = f"http://{ports.LOOPBACK}:{port['nova']}/v2.1"
    identity, cloud = folder / "identity.json", folder / "cloud.json"
    for name, written, more in (("keystone", identity, [compute]), ("nova", cloud, [])):
        # They also end if this process is killed.
        argv = ["setpriv", "--pdeathsig", "TERM", "--"]
        argv += [python, SOURCES / f"serve_{name}.py", folder, port[name], *more]
        log = layout.LOGS / "peer" / f"{name}.log"
        with Step(f"starting {name}") as step:
            # An interrupt between the start and the registration of the callback would leave the process running.
            with interrupts.held_back():
                # Python's warnings about OpenStack's code are irrelevant here.
                child = processes.spawn(argv, {**os.environ, "PYTHONWARNINGS": "ignore"}, log)
                running.callback(_stop, child)
            while not written.exists():
                if child.poll() is not None or step.elapsed() > READY_LIMIT:
                    how = "did not become ready" if child.poll() is None else processes.ended_how(child.returncode)
                    raise Problem(f"{name}: {how}", processes.tail(log, processes.SHOWN_LINES))
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
