"""The table of commands; help and exit codes."""

import sys
from dataclasses import dataclass
from typing import Callable, List

from . import bench, checks, fuzz, inspect, peer, up
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
        "up [--detach] [--guest]",
        "install what is missing, build, start everything, tell how to use it; --guest: with a real VM of QEMU", up.up,
    ),
    Command("status [--json]", "what runs, where, and how it is", inspect.status),
    Command("logs [SERVICE...] [-f]", "the end of all logs, or whole ones; -f goes on", inspect.logs),
    Command("down", "stop the stack; its data stays under .dev/", inspect.down),
    Command("test [ARGUMENTS]", "formatting, lints and every test; arguments go to the test runner", checks.test),
    Command("test --containers", "the same, then the images and compose.yaml, in Docker (root, where none runs)", checks.test),
    Command("soak [--minutes N]", "the long forms of the fault tests, with mixed load for N minutes [60]", bench.soak),
    Command("fuzz [SECONDS]", "made-up input for the parsers that meet strangers', 30 s each", fuzz.fuzz),
    Command(
        "bench NAME [ARGUMENTS]",
        "measure: gateway, login, agent, ingest, latest or all; --json FILE, --report FILE (Markdown)", bench.bench,
    ),
    Command("peer nova", "the driver's tests against real OpenStack: Keystone and Nova, installed for it", peer.peer),
    Command("install", "only install what `up` and `test` need", up.install),
    Command("help", "this", lambda _: show_help()),
]

SETTINGS = [
    ("VMWATCH_LISTEN", "address of the gateway [127.0.0.1:8086]"),
    ("VMWATCH_NATS_URL", "a NATS server to use instead of starting one, 2.11 or newer, JetStream on"),
    ("VMWATCH_MONGODB_URI", "a MongoDB to use instead of starting one"),
    ("VMWATCH_HYPERVISORS", "hypervisors to use instead of libvirt's test hypervisor, such as lab=qemu:///system"),
    ("VMWATCH_INSTANCE_ID", "this machine's instance id, else its DMI product_uuid"),
    ("VMWATCH_DEV_DIR", "where a stack keeps data, logs and the first password [.dev]"),
    ("VMWATCH_CACHE", "where tools are installed [~/.cache/vmwatch]"),
    ("NO_COLOR", "no colours"),
]


def show_help() -> int:
    say("./dev COMMAND: vmwatch for development")
    say()
    say(style("Commands", "strong"))
    say(table([("  " + command.usage, command.summary) for command in COMMANDS]))
    say()
    say("test and soak take --json FILE: there they write the figures that the tests measured.")
    say()
    say(style("Settings", "strong") + " (environment variables; those of the programs are passed on to them)")
    say(table([("  " + name, help_text) for name, help_text in SETTINGS]))
    return 0


def main(arguments: List[str]) -> int:
    name, *rest = arguments or ["help"]
    if name in ("-h", "--help") or "--help" in rest or "-h" in rest:
        return show_help()
    command = next((command for command in COMMANDS if command.name == name), None)
    try:
        if sys.platform != "linux":
            raise Problem("./dev runs on Linux: the agent reads /proc")
        if command is None:
            raise Problem(f"there is no command `{name}`", "./dev help lists them.", EX_USAGE)
        return command.run(rest)
    except Problem as problem:
        tell(problem)
        return problem.code
    except KeyboardInterrupt:
        # 128 + SIGINT, as a shell has it.
        return 130
    except BrokenPipeError:
        # Who read our output (`./dev logs | head`) has seen enough; nor may the interpreter flush at exit.
        sys.stderr.close()
        return 0
