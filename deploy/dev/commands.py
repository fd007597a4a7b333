"""The table of commands, the help text, and the exit codes of ./dev."""

import sys
from dataclasses import dataclass
from typing import Callable, List

from . import bench, checks, fuzz, inspect, package, peer, up
from .terminal import EX_USAGE, Problem, say, style, table, tell


@dataclass(frozen=True)
class Command:
    usage: str
    summary: str
    run: Callable[[List[str]], int]

    @property
    def name(self) -> str:
        return self.usage.split()[0]


COMMANDS = [
    Command(
        "up [--detach] [--guest [--no-agent]]",
        "install missing tools, build and start a stack, and print how to use it; --guest adds a real VM in QEMU, "
        "--no-agent leaves the agent out of it", up.up,
    ),
    Command("status [--json]", "show the running programs, their state and addresses", inspect.status),
    Command("logs [SERVICE...] [-f]", "show the last lines of all logs, or the named services' whole logs; -f follows them", inspect.logs),
    Command("down", "stop the stack; its data stays in .dev/", inspect.down),
    Command("test [ARGUMENTS]", "check formatting and lints, run all tests; arguments are passed to the test runner", checks.test),
    Command(
        "test --containers",
        "run ./dev test, then test the images and compose.yaml in Docker (needs root if no Docker engine runs)", checks.test,
    ),
    Command("soak [--minutes N]", "run the long forms of the fault tests, with mixed load for N minutes [60]", bench.soak),
    Command("fuzz [SECONDS]", "fuzz the parsers of untrusted input, each for SECONDS [30]", fuzz.fuzz),
    Command(
        "bench NAME [ARGUMENTS]",
        "run a benchmark: gateway, login, tokens, agent, store, latest, fleet, alerts, top or all; --json FILE and --report FILE write the results", bench.bench,
    ),
    Command("package", "build the packages of the agent (.deb, .rpm) and of the command line (.deb) for this machine's architecture into .dev/packages", package.package),
    Command("peer nova", "install OpenStack's Keystone and Nova and test the Nova driver against them", peer.peer),
    Command("install", "install the tools that `up` and `test` need, without building vmwatch", up.install),
    Command("help", "show this help", lambda _: show_help()),
]

SETTINGS = [
    ("VMWATCH_LISTEN", "address and port of the gateway; a loopback address, 0.0.0.0 or [::] [127.0.0.1:8086]"),
    ("VMWATCH_NATS_URL", "use this NATS server (2.11 or newer, with JetStream) instead of starting one"),
    ("VMWATCH_MONGODB_URI", "use this MongoDB instead of starting a database"),
    ("VMWATCH_HYPERVISORS", "use these hypervisors, such as lab=qemu:///system, instead of libvirt's test driver"),
    ("VMWATCH_INSTANCE_ID", "instance id of this machine [its DMI product_uuid]"),
    ("VMWATCH_DEV_DIR", "folder for data, logs and the initial password [.dev]"),
    ("VMWATCH_CACHE", "folder for installed tools [~/.cache/vmwatch]"),
    ("NO_COLOR", "if set, disables colours"),
]


def show_help() -> int:
    say("./dev COMMAND: development tool of vmwatch")
    say()
    say(style("Commands", "strong"))
    say(table([("  " + command.usage, command.summary) for command in COMMANDS]))
    say()
    say("With --json FILE, test and soak write the figures that the tests measured to FILE.")
    say()
    say(style("Settings", "strong") + " (environment variables; settings of the programs can be set as well; see docs/settings.md)")
    say(table([("  " + name, help_text) for name, help_text in SETTINGS]))
    return 0


def main(arguments: List[str]) -> int:
    name, *rest = arguments or ["help"]
    if name in ("-h", "--help") or "--help" in rest or "-h" in rest:
        return show_help()
    command = next((command for command in COMMANDS if command.name == name), None)
    try:
        if sys.platform != "linux":
            raise Problem("./dev runs only on Linux, because the agent reads /proc")
        if command is None:
            raise Problem(f"unknown command `{name}`", "See ./dev help.", EX_USAGE)
        return command.run(rest)
    except Problem as problem:
        tell(problem)
        return problem.code
    except KeyboardInterrupt:
        # The exit code is 128 + SIGINT, as in a shell.
        return 130
    except BrokenPipeError:
        # The program that reads the output has closed the pipe (`./dev logs | head`). Closing stderr keeps the
        # interpreter from printing an error when it flushes at exit.
        sys.stderr.close()
        return 0
