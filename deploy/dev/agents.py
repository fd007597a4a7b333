"""Enrols the agents of a stack, as an administrator does with `vmwatch-auth join-token create` and `vmwatch-agent enroll`."""

import shutil
import subprocess
from pathlib import Path

from . import layout, processes
from .stack import Plan, Program
from .terminal import Problem

# The identity of this machine's agent.
IDENTITY = layout.DOT / "agent-identity"
LIMIT = 60


def enrol(plan: Plan, instance: str, identity: Path) -> None:
    """Enrols an agent of this VM with a new key, which replaces that of an earlier start. NATS may have another address or other
    data than then, so a former identity may be of no use."""
    shutil.rmtree(identity, ignore_errors=True)
    token = _run(plan.auth(), ["join-token", "create", "--instances", instance, "--replace"], "")
    agent = plan.agent(identity)
    # The token goes through pipes, so that it is in no argument and no file.
    arguments = ["enroll", "--gateway", plan.state.gateway, "--token-file", "-", "--instance-id", instance]
    _run(agent, arguments, token)


def _run(program: Program, arguments: list, given: str) -> str:
    """Runs a command of a program and returns its output."""
    argv = [str(part) for part in [*program.argv, *arguments]]
    try:
        done = subprocess.run(argv, env=program.env, input=given, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        raise Problem(f"`{program.name} {arguments[0]}` timed out after {LIMIT} s", f"See ./dev logs {program.name}.") from None
    if done.returncode != 0:
        how = processes.ended_how(done.returncode)
        raise Problem(f"`{program.name} {arguments[0]}` failed with {how}", f"Its error output:\n{done.stderr.strip()}")
    return done.stdout
