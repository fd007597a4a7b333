"""`test`: formatting, lints, builds and all tests. Stops at the first failure."""

import os
import shutil
import subprocess
import sys

from . import cargo, dependencies, figures, guest, layout, processes, schemathesis, tools, web
from .terminal import Problem, Step, say, style


# The arguments that each option passes to deploy/offline/run.
CONTAINERS = {"--containers": [], "--containers=if-possible": ["--if-possible"]}


def test(arguments) -> int:
    """Runs all checks that a change must pass. Arguments other than these go to the test runner:

    --containers also runs the images and compose.yaml, and end-to-end tests with NATS and the database in containers;
    --containers=if-possible does so only if a Docker engine is available. --json FILE writes what the tests measured.
    """
    target, arguments = figures.option(arguments, "--json")
    offline = [CONTAINERS[argument] for argument in arguments if argument in CONTAINERS]
    arguments = [argument for argument in arguments if argument not in CONTAINERS]
    cargo.check()
    _components()
    tools.install_system(tools.BUILD_NEEDS)
    environment = _environment()
    _step("formatting", "fmt", ["cargo", "fmt", "--all", "--check"])
    _step("unit tests of ./dev", "dev-parts", _unittest("test_*.py"))
    _step("deployment files", "deployment", [sys.executable, "-B", layout.ROOT / "deploy" / "check" / "run"])
    dependencies.check()
    # The gateway embeds the page, so the page is built first.
    web.build()
    _step("lints", "clippy", ["cargo", "clippy", "--workspace", "--all-targets", *_locked(), "--", "-D", "warnings"])
    for title, name, command in _without_libvirt():
        _step(title, name, command)
    # Built last, because the previous steps leave a vmwatch-lifecycle without libvirt in the same folder.
    _step("binaries for the tests", "build", ["cargo", "build", "--workspace", "--bins", *_locked()])
    _step("./dev up, pasted lines, ./dev down", "dev-whole", _unittest("whole_*.py"))
    _step("examples in the documentation", "doc", ["cargo", "test", "--workspace", "--doc", *_locked()])
    runner = _runner(arguments)
    say(f"\n{style('tests', 'strong')}: {' '.join(runner)}")
    # Show the runner's own output.
    with figures.Figures(target) as measured:
        environment.update(measured.environment())
        code = subprocess.run(runner, cwd=layout.ROOT, env=environment).returncode
    if code or not offline:
        return code
    return subprocess.run([sys.executable, "-B", layout.ROOT / "deploy" / "offline" / "run", *offline[0]]).returncode


def _without_libvirt() -> list:
    """The lints of lifecycle-svc without libvirt, and its tests with Nova only."""
    package = ["-p", "lifecycle-svc", "--no-default-features", *_locked()]
    return [
        ("lints without libvirt", "clippy-nova", ["cargo", "clippy", *package, "--all-targets", "--", "-D", "warnings"]),
        (
            "the service without libvirt", "test-nova",
            ["cargo", "test", *package, "--test", "lifecycle", "--", "nova_either", "without_libvirt"],
        ),
    ]


def _environment() -> dict:
    """The variables that tell the tests which programs to start. Variables already set take precedence."""
    environment = servers()
    tools.install_system(tools.FILTER_NEEDS)
    if not environment.get("VMWATCH_TEST_SCHEMATHESIS"):
        environment["VMWATCH_TEST_SCHEMATHESIS"] = str(schemathesis.program())
    if not environment.get("VMWATCH_TEST_GUEST"):
        environment["VMWATCH_TEST_GUEST"] = str(guest.image())
    if not environment.get("VMWATCH_TEST_NODE"):
        environment["VMWATCH_TEST_NODE"] = str(web.node())
    if not environment.get("VMWATCH_TEST_CHROMIUM"):
        tools.install_system([web.CHROMIUM])
        environment["VMWATCH_TEST_CHROMIUM"] = str(web.chromium())
    return environment


def servers() -> dict:
    """The environment with the NATS server and database to start. Variables already set take precedence."""
    environment = dict(os.environ)
    if not environment.get("VMWATCH_TEST_NATS_SERVER"):
        environment["VMWATCH_TEST_NATS_SERVER"] = str(tools.nats_server())
    if not environment.get("VMWATCH_TEST_DATABASE"):
        environment["VMWATCH_TEST_DATABASE"] = str(tools.database().program)
    return environment


def _locked() -> list:
    """In CI, an outdated lock file is an error."""
    return ["--locked"] if os.environ.get("CI") else []


def _components() -> None:
    """Installs rustfmt and clippy, which rustup's minimal profile does not include."""
    missing = [name for name in ("rustfmt", "clippy") if not _has(name)]
    if not missing:
        return
    if not shutil.which("rustup"):
        raise Problem(
            f"{' and '.join(missing)} not found", "Install them from the same source as your Rust toolchain."
        )
    with Step(f"adding {' and '.join(missing)} to the Rust toolchain") as step:
        processes.run(step, ["rustup", "component", "add", *missing], layout.LOGS / "rustup.log", cwd=layout.ROOT)
        step.done()


def _has(component: str) -> bool:
    command = {"rustfmt": "fmt", "clippy": "clippy"}[component]
    return subprocess.run(["cargo", command, "--version"], capture_output=True, cwd=layout.ROOT).returncode == 0


def _unittest(pattern: str) -> list:
    """The command that runs this tool's own tests. -B avoids __pycache__ folders next to the sources."""
    where = ["-t", "deploy", "-s", "deploy/dev/tests", "-p", pattern]
    return [sys.executable, "-B", "-W", "error", "-m", "unittest", "discover", "-v", *where]


def _step(title: str, name: str, command: list) -> None:
    with Step(title) as step:
        log = layout.LOGS / "test" / f"{name}.log"
        processes.run(step, command, log, cargo.progress, env=cargo.environment(), cwd=layout.ROOT)
        step.done()


def _runner(arguments: list) -> list:
    """The test command: nextest if it is installed, or else cargo test."""
    if subprocess.run(["cargo", "nextest", "--version"], capture_output=True).returncode == 0:
        profile = ["--profile", "ci"] if os.environ.get("CI") else []
        return ["cargo", "nextest", "run", "--workspace", *profile, *_locked(), *arguments]
    all_failures = ["--no-fail-fast"] if os.environ.get("CI") else []
    return ["cargo", "test", "--workspace", "--lib", "--bins", "--tests", *all_failures, *_locked(), *arguments]


def e2e_runner(names: list) -> list:
    """The command that runs the end-to-end tests whose names contain one of these texts."""
    if _runner([])[1] == "nextest":
        return ["cargo", "nextest", "run", "--workspace", "--no-fail-fast", *_locked(), "--test", "e2e", "--", *names]
    return ["cargo", "test", "--workspace", "--no-fail-fast", *_locked(), "--test", "e2e", "--", *names]
