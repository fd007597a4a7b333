"""`bench`: measures on release builds; the machine should have nothing else to do. `soak`: the long forms of tests."""

import subprocess

from . import cargo, checks, layout, processes, tools
from .terminal import Problem, Step, say, style

# What each bench starts beside itself.
PROGRAMS = {"ingest": ["metrics-svc"], "latest": ["metrics-svc"]}
# How long parts of a stack are away in a soak; the tests say 3s.
OUTAGE = "30s"


def bench(arguments) -> int:
    """Builds what is measured and hands the arguments to the crate `bench`."""
    name = next((argument for argument in arguments if not argument.startswith("-")), "")
    if name not in PROGRAMS:
        raise Problem(f"there is no bench `{name}`", "Write ./dev bench and one of: " + ", ".join(PROGRAMS))
    cargo.check()
    tools.install_system(tools.BUILD_NEEDS)
    environment = checks.servers()
    with Step("building for release") as step:
        command = ["cargo", "build", "--release"]
        for package in ["bench", *PROGRAMS[name]]:
            command += ["--package", package]
        log = layout.LOGS / "bench.log"
        processes.run(step, command, log, cargo.progress, env=cargo.environment(), cwd=layout.ROOT)
        step.done()
    program = cargo.target_folder("release") / "bench"
    return subprocess.run([program, *arguments], env=environment).returncode


def soak(arguments) -> int:
    """The fault tests of ingestion with long outages; arguments go to the test runner."""
    cargo.check()
    environment = {"VMWATCH_TEST_OUTAGE": OUTAGE, **checks.servers()}
    cargo.build("binaries for the tests")
    runner = ["cargo", "test", "--package", "e2e", "--test", "e2e", "--", "--nocapture", "--test-threads", "2"]
    runner += arguments or ["ingest"]
    say(f"\n{style('soak', 'strong')}: outages of {environment['VMWATCH_TEST_OUTAGE']}: {' '.join(runner)}")
    return subprocess.run(runner, cwd=layout.ROOT, env=environment).returncode
