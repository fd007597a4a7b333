"""`bench` runs benchmarks on release builds, best on an idle machine. `soak` runs the long forms of the fault tests."""

import subprocess

from . import baselines, cargo, checks, figures, layout, processes, tools, web
from .terminal import EX_USAGE, Problem, Step, say, style

SERVICES = ["gateway", "metrics-svc", "auth-svc", "lifecycle-svc"]
# The binaries that each benchmark needs.
PROGRAMS = {
    "store": [*SERVICES, "agent"],
    "latest": ["metrics-svc"],
    "gateway": [*SERVICES, "agent"],
    "login": SERVICES,
    "tokens": ["gateway", "auth-svc"],
    "agent": ["metrics-svc", "agent"],
    "fleet": SERVICES,
    "alerts": ["metrics-svc", "lifecycle-svc", "alert-svc"],
    "top": [*SERVICES, "agent", "vmwatch-cli"],
    "all": [*SERVICES, "alert-svc", "agent", "vmwatch-cli"],
}
# The benchmarks that compare vmwatch with programs in Python and Node.js.
COMPARING = ["gateway", "all"]
# The benchmarks that record samples from an agent in a guest.
RECORDING = ["store", "all"]
# The benchmarks that open the page in a browser.
BROWSING = ["fleet", "all"]
# Duration of each outage in a soak test; in other tests the default is 3 s.
OUTAGE = "30s"


def bench(arguments) -> int:
    """Builds the programs and runs the benchmark with the given arguments."""
    name = next((argument for argument in arguments if not argument.startswith("-")), "")
    if name not in PROGRAMS:
        raise Problem(f"unknown benchmark `{name}`", "Run ./dev bench with one of: " + ", ".join(PROGRAMS))
    cargo.check()
    tools.install_system(tools.BUILD_NEEDS)
    environment = checks.servers()
    if name in COMPARING:
        environment.update(baselines.environment())
    if name in RECORDING:
        checks.add_guest(environment)
        tools.install_system(tools.CLOCK_NEEDS)
    if name in BROWSING:
        checks.add_browser(environment)
        web.build()
    _build_for_release([f"--package={package}" for package in ["bench", *PROGRAMS[name]]])
    program = cargo.target_folder("release") / "bench"
    return subprocess.run([program, *arguments], env=environment).returncode


def _build_for_release(what) -> None:
    with Step("building for release") as step:
        command = ["cargo", "build", "--release", *what]
        log = layout.LOGS / "bench.log"
        processes.run(step, command, log, cargo.progress, env=cargo.environment(), cwd=layout.ROOT)
        step.done()


def soak(arguments) -> int:
    """Runs the long forms of the fault tests. Remaining arguments are passed to the test runner."""
    target, arguments = figures.option(arguments, "--json")
    minutes, arguments = figures.option(arguments, "--minutes")
    minutes = minutes or "60"
    if not minutes.isdecimal() or int(minutes) == 0:
        raise Problem(f"--minutes must be a whole number of at least 1, not `{minutes}`", code=EX_USAGE)
    measured = figures.Figures(target)
    cargo.check()
    environment = {"VMWATCH_TEST_OUTAGE": OUTAGE, **checks.servers(), "VMWATCH_TEST_SOAK": f"{minutes}m"}
    _build_for_release(["--workspace", "--bins"])
    runner = ["cargo", "test", "--release", "--package", "e2e", "--test", "e2e", "--"]
    # The tests run one at a time, because the long forms check time limits.
    runner += ["--nocapture", "--test-threads", "1"]
    runner += arguments or ["ingest", "faults", "security::guest", "security::passwords"]
    outages = f"outages of {environment['VMWATCH_TEST_OUTAGE']}, mixed load for {minutes} min"
    say(f"\n{style('soak', 'strong')}: {outages}: {' '.join(runner)}")
    with measured:
        return subprocess.run(runner, cwd=layout.ROOT, env={**environment, **measured.environment()}).returncode
