"""`test`: formatting, lints, builds, every test. The first step that fails ends it."""

import os
import shutil
import subprocess
import sys

from . import cargo, dependencies, figures, guest, layout, processes, schemathesis, tools, web
from .terminal import Problem, Step, say, style


# What each means to deploy/offline/run.
CONTAINERS = {"--containers": [], "--containers=if-possible": ["--if-possible"]}


def test(arguments) -> int:
    """Everything that must hold before a change goes in; arguments go to the test runner.

    Two are ours: with --containers the images and compose.yaml are run as well, at the end, and end-to-end tests with
    NATS and the database in containers, with --containers=if-possible where a Docker engine can be had; --json FILE
    writes the figures of the tests.
    """
    target, arguments = figures.option(arguments, "--json")
    offline = [CONTAINERS[argument] for argument in arguments if argument in CONTAINERS]
    arguments = [argument for argument in arguments if argument not in CONTAINERS]
    cargo.check()
    _components()
    tools.install_system(tools.BUILD_NEEDS)
    environment = _environment()
    _step("formatting", "fmt", ["cargo", "fmt", "--all", "--check"])
    _step("parts of ./dev", "dev-parts", _unittest("test_*.py"))
    _step("deployment files", "deployment", [sys.executable, "-B", layout.ROOT / "deploy" / "check" / "run"])
    dependencies.check()
    # Before any build of the gateway, which holds it.
    web.build()
    _step("lints", "clippy", ["cargo", "clippy", "--workspace", "--all-targets", *_locked(), "--", "-D", "warnings"])
    for title, name, command in _without_libvirt():
        _step(title, name, command)
    # After those, which leave a vmwatch-lifecycle of their own in the same place.
    _step("binaries for the tests", "build", ["cargo", "build", "--workspace", "--bins", *_locked()])
    _step("./dev up, its lines, down", "dev-whole", _unittest("whole_*.py"))
    _step("examples in the documentation", "doc", ["cargo", "test", "--workspace", "--doc", *_locked()])
    runner = _runner(arguments)
    say(f"\n{style('tests', 'strong')}: {' '.join(runner)}")
    # The runner speaks for itself, to the last line.
    with figures.Figures(target) as measured:
        environment.update(measured.environment())
        code = subprocess.run(runner, cwd=layout.ROOT, env=environment).returncode
    if code or not offline:
        return code
    return subprocess.run([sys.executable, "-B", layout.ROOT / "deploy" / "offline" / "run", *offline[0]]).returncode


def _without_libvirt() -> list:
    """lifecycle-svc where there is no libvirt: linted whole, run on Nova alone."""
    package = ["-p", "lifecycle-svc", "--no-default-features", *_locked()]
    return [
        ("lints without libvirt", "clippy-nova", ["cargo", "clippy", *package, "--all-targets", "--", "-D", "warnings"]),
        (
            "the service without libvirt", "test-nova",
            ["cargo", "test", *package, "--test", "lifecycle", "--", "nova_either", "without_libvirt"],
        ),
    ]


def _environment() -> dict:
    """What the tests start, where the caller has not said so."""
    environment = servers()
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
    """The environment of what starts servers of its own, where the caller has not said which."""
    environment = dict(os.environ)
    if not environment.get("VMWATCH_TEST_NATS_SERVER"):
        environment["VMWATCH_TEST_NATS_SERVER"] = str(tools.nats_server())
    if not environment.get("VMWATCH_TEST_DATABASE"):
        environment["VMWATCH_TEST_DATABASE"] = str(tools.database().program)
    return environment


def _locked() -> list:
    """In CI the lock file is what is built, and a stale one is a failure."""
    return ["--locked"] if os.environ.get("CI") else []


def _components() -> None:
    """rustup's minimal profile has neither formatter nor linter."""
    missing = [name for name in ("rustfmt", "clippy") if not _has(name)]
    if not missing:
        return
    if not shutil.which("rustup"):
        raise Problem(f"cargo lacks {' and '.join(missing)}", "Install them from where your Rust came from.")
    with Step(f"adding {' and '.join(missing)} to the Rust toolchain") as step:
        processes.run(step, ["rustup", "component", "add", *missing], layout.LOGS / "rustup.log", cwd=layout.ROOT)
        step.done()


def _has(component: str) -> bool:
    command = {"rustfmt": "fmt", "clippy": "clippy"}[component]
    return subprocess.run(["cargo", command, "--version"], capture_output=True, cwd=layout.ROOT).returncode == 0


def _unittest(pattern: str) -> list:
    """Python's own unittest, of this script. -B: nothing is written beside the sources."""
    where = ["-t", "deploy", "-s", "deploy/dev/tests", "-p", pattern]
    return [sys.executable, "-B", "-W", "error", "-m", "unittest", "discover", "-v", *where]


def _step(title: str, name: str, command: list) -> None:
    with Step(title) as step:
        log = layout.LOGS / "test" / f"{name}.log"
        processes.run(step, command, log, cargo.progress, env=cargo.environment(), cwd=layout.ROOT)
        step.done()


def _runner(arguments: list) -> list:
    """nextest where it is there; cargo's own runner needs no installation."""
    if subprocess.run(["cargo", "nextest", "--version"], capture_output=True).returncode == 0:
        profile = ["--profile", "ci"] if os.environ.get("CI") else []
        return ["cargo", "nextest", "run", "--workspace", *profile, *_locked(), *arguments]
    all_failures = ["--no-fail-fast"] if os.environ.get("CI") else []
    return ["cargo", "test", "--workspace", "--lib", "--bins", "--tests", *all_failures, *_locked(), *arguments]


def e2e_runner(names: list) -> list:
    """The same for end-to-end tests with one of these texts in their names."""
    if _runner([])[1] == "nextest":
        return ["cargo", "nextest", "run", "--workspace", "--no-fail-fast", *_locked(), "--test", "e2e", "--", *names]
    return ["cargo", "test", "--workspace", "--no-fail-fast", *_locked(), "--test", "e2e", "--", *names]
