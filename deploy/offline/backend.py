"""Runs end-to-end tests with NATS and the database in containers, started by the testcontainers crate."""

from pathlib import Path

from dev import cargo, checks, layout, processes
from dev.terminal import Step

from .engine import LOGS, Engine

# The label that tests put on each container. Its value is the process id of the test (testkit/src/container.rs).
LABEL = "vmwatch-e2e"
# Parts of the names of the tests to run: some of each kind, and all that kill, freeze or restart NATS or the database.
# The tests faults::rollback, faults::restore and faults::disk are omitted: they replace files of a server and therefore
# always run the servers as processes, which `./dev test` has done already.
STORIES = [
    "api::", "bus::", "faults::bus::", "faults::database::", "ingest", "permissions::", "rest::vms::", "sessions::",
    "traces::",
]
LIMIT = 900.0


def run(engine: Engine, standins) -> None:
    """Runs the tests, then removes the containers that killed tests left behind."""
    environment = {
        **checks.servers(), **cargo.environment(), **engine.environment, **standins.variables,
        "VMWATCH_TEST_BACKEND": "containers",
    }
    log = LOGS / "e2e-containers.log"
    try:
        with Step("end-to-end tests, with NATS and the database in containers") as step:
            command = checks.e2e_runner(STORIES)
            processes.run(step, command, log, env=environment, cwd=layout.ROOT, limit=LIMIT)
            step.done(summary(log))
    finally:
        remove_left(engine)


def summary(log: Path) -> str:
    """Returns the last line of the test runner's summary."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    words = [line for line in lines if line.startswith(("Summary", "test result:"))]
    return words[-1] if words else ""


def remove_left(engine: Engine) -> None:
    """Removes containers of tests whose process has ended."""
    form = '{{.ID}} {{.Label "' + LABEL + '"}}'
    for line in engine.run("ps", "--all", "--filter", f"label={LABEL}", "--format", form).stdout.splitlines():
        container, process = line.split()
        if not Path("/proc", process).exists():
            engine.run("rm", "--force", "--volumes", container)
