"""`peer` tests the Nova driver against a real OpenStack Nova, which it installs and starts."""

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
# The minimum Python version that Nova 34 and Keystone 30 support.
LEAST = (3, 11)
# Time limit for starting a service. Creating its database takes about half a minute on two idle cores.
READY_LIMIT = 300.0
STOP_LIMIT = 10.0


def peer(arguments) -> int:
    """Tests the Nova driver against OpenStack's Keystone and Nova with its fake compute driver.

    Remaining arguments are passed to the test runner.
    """
    if arguments[:1] != ["nova"]:
        raise Problem("`peer` supports only `peer nova`", code=EX_USAGE)
    cargo.check()
    environment = checks.servers()
    python = venv.environment("openstack", SOURCES / "requirements.txt", LEAST, "") / "bin" / "python"
    interrupts.install()
    # The folder contains temporary passwords. Only this user can read it, and it is deleted at the end.
    with tempfile.TemporaryDirectory(prefix="vmwatch-nova-") as folder, contextlib.ExitStack() as running:
        environment["VMWATCH_TEST_NOVA"] = str(_start(python, Path(folder), running))
        runner = ["cargo", "test", "--package", "lifecycle-svc", "--test", "lifecycle", "--", "nova_either", *arguments[1:]]
        say(f"\n{style('tests', 'strong')}: {' '.join(runner)}")
        return subprocess.run(runner, cwd=layout.ROOT, env=environment).returncode


def _start(python: Path, folder: Path, running: contextlib.ExitStack) -> Path:
    """Starts Keystone and Nova. Returns the path of the file with the configuration for clients, which serve_nova.py writes."""
    port = ports.choose(["keystone", "nova"], {}, str(layout.DOT))
    compute = f"http://{ports.LOOPBACK}:{port['nova']}/v2.1"
    identity, cloud = folder / "identity.json", folder / "cloud.json"
    for name, written, more in (("keystone", identity, [compute]), ("nova", cloud, [])):
        # setpriv makes the services end as well if this process is killed.
        argv = ["setpriv", "--pdeathsig", "TERM", "--"]
        argv += [python, SOURCES / f"serve_{name}.py", folder, port[name], *more]
        log = layout.LOGS / "peer" / f"{name}.log"
        with Step(f"starting {name}") as step:
            # Interrupts are deferred, because one between the start and the registration of the callback would leave
            # the process running.
            with interrupts.held_back():
                # Python's warnings about OpenStack's own code are suppressed because they are irrelevant here.
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
