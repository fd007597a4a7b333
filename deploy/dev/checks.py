"""`test`: formatting, lints, builds and all tests. Stops at the first failure."""

import os
import shutil
import subprocess
import sys
from typing import Optional

from . import cargo, dependencies, figures, guest, layout, mail, package, processes, schemathesis, tools, web
from .terminal import Problem, Step, say, style


# The arguments for deploy/offline/run, by the option of `./dev test`.
CONTAINERS = {"--containers": [], "--containers=if-possible": ["--if-possible"]}


def test(arguments) -> int:
    """Runs all checks that a change must pass. Arguments other than the following are passed to the test runner:

    --containers also tests the images and compose.yaml, and runs end-to-end tests with NATS and the database in containers;
    --containers=if-possible does so only if a Docker engine is available. --json FILE writes the figures that tests measured.
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
    # The web page is built first, because the gateway's binary contains it.
    web.build()
    _step("lints", "clippy", ["cargo", "clippy", "--workspace", "--all-targets", *_locked(), "--", "-D", "warnings"])
    for title, name, command in _without_libvirt():
        _step(title, name, command)
    # This is the last build, because the previous steps leave a vmwatch-lifecycle without libvirt in the same folder.
    _step("binaries for the tests", "build", ["cargo", "build", "--workspace", "--bins", *_locked()])
    _step("./dev up, pasted lines, ./dev down", "dev-whole", _unittest("whole_*.py"))
    tools.install_system(package.TEST_NEEDS)
    with figures.Figures(target) as measured:
        environment.update(measured.environment())
        _step("the packages", "packages", _unittest("packages*.py"), measured.environment())
        _step("examples in the API documentation", "doc", ["cargo", "test", "--workspace", "--doc", *_locked()])
        runner = _runner(arguments)
        say(f"\n{style('tests', 'strong')}: {' '.join(runner)}")
        # The test runner's own output is shown instead of a progress line.
        code = subprocess.run(runner, cwd=layout.ROOT, env=environment).returncode
    if code or not offline:
        return code
    return subprocess.run([sys.executable, "-B", layout.ROOT / "deploy" / "offline" / "run", *offline[0]]).returncode


def _without_libvirt() -> list:
    """Runs the lints and tests of lifecycle-svc built without libvirt, that is, only with the Nova driver."""
    package = ["-p", "lifecycle-svc", "--no-default-features", *_locked()]
    return [
        ("lints without libvirt", "clippy-nova", ["cargo", "clippy", *package, "--all-targets", "--", "-D", "warnings"]),
        (
            "the service without libvirt", "test-nova",
            ["cargo", "test", *package, "--test", "lifecycle", "--", "nova_either", "without_libvirt"],
        ),
    ]


def _environment() -> dict:
    """Returns the environment variables with the paths of programs that tests start. Variables already set take precedence."""
    environment = servers()
    tools.install_system([*tools.FILTER_NEEDS, *tools.CLOCK_NEEDS])
    if not environment.get("VMWATCH_TEST_SCHEMATHESIS"):
        environment["VMWATCH_TEST_SCHEMATHESIS"] = str(schemathesis.program())
    add_guest(environment)
    add_browser(environment)
    if not environment.get("VMWATCH_TEST_NGINX"):
        environment["VMWATCH_TEST_NGINX"] = str(tools.nginx())
    if not environment.get("VMWATCH_TEST_ALERTMANAGER"):
        environment["VMWATCH_TEST_ALERTMANAGER"] = str(tools.alertmanager())
    if not environment.get("VMWATCH_TEST_PROMETHEUS"):
        environment["VMWATCH_TEST_PROMETHEUS"] = str(tools.prometheus())
    if not environment.get("VMWATCH_TEST_MAIL_PYTHON"):
        environment["VMWATCH_TEST_MAIL_PYTHON"] = str(mail.python())
    return environment


def servers() -> dict:
    """Returns the environment with the paths of NATS and the database for tests. Variables already set take precedence."""
    environment = dict(os.environ)
    if not environment.get("VMWATCH_TEST_NATS_SERVER"):
        environment["VMWATCH_TEST_NATS_SERVER"] = str(tools.nats_server())
    if not environment.get("VMWATCH_TEST_DATABASE"):
        environment["VMWATCH_TEST_DATABASE"] = str(tools.database().program)
    return environment


def add_guest(environment: dict) -> None:
    """Adds the folder of the test guest's kernel and file system. A variable already set takes precedence."""
    if not environment.get("VMWATCH_TEST_GUEST"):
        environment["VMWATCH_TEST_GUEST"] = str(guest.image())


def add_browser(environment: dict) -> None:
    """Adds the paths of Node.js and Chromium, for tests of the page. Variables already set take precedence."""
    if not environment.get("VMWATCH_TEST_NODE"):
        environment["VMWATCH_TEST_NODE"] = str(web.node())
    if not environment.get("VMWATCH_TEST_CHROMIUM"):
        tools.install_system([web.CHROMIUM])
        environment["VMWATCH_TEST_CHROMIUM"] = str(web.chromium())


def _locked() -> list:
    """Returns the option that makes an outdated lock file an error in CI."""
    return ["--locked"] if os.environ.get("CI") else []


def _components() -> None:
    """Installs rustfmt and clippy if they are missing; rustup's minimal profile does not include them."""
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
    """Returns the command that runs the tests of ./dev. -B avoids __pycache__ folders next to the sources."""
    where = ["-t", "deploy", "-s", "deploy/dev/tests", "-p", pattern]
    return [sys.executable, "-B", "-W", "error", "-m", "unittest", "discover", "-v", *where]


def _step(title: str, name: str, command: list, further: Optional[dict] = None) -> None:
    """Runs a command, with these further environment variables."""
    with Step(title) as step:
        log = layout.LOGS / "test" / f"{name}.log"
        environment = cargo.environment() | (further or {})
        processes.run(step, command, log, cargo.progress, env=environment, cwd=layout.ROOT)
        step.done()


def _runner(arguments: list) -> list:
    """Returns the command that runs the tests: cargo nextest if it is installed, otherwise cargo test."""
    if subprocess.run(["cargo", "nextest", "--version"], capture_output=True).returncode == 0:
        profile = ["--profile", "ci"] if os.environ.get("CI") else []
        return ["cargo", "nextest", "run", "--workspace", *profile, *_locked(), *arguments]
    all_failures = ["--no-fail-fast"] if os.environ.get("CI") else []
    return ["cargo", "test", "--workspace", "--lib", "--bins", "--tests", *all_failures, *_locked(), *arguments]


def e2e_runner(names: list) -> list:
    """Returns the command that runs the end-to-end tests whose names contain one of the given texts."""
    if _runner([])[1] == "nextest":
        return ["cargo", "nextest", "run", "--workspace", "--no-fail-fast", *_locked(), "--test", "e2e", "--", *names]
    return ["cargo", "test", "--workspace", "--no-fail-fast", *_locked(), "--test", "e2e", "--", *names]
