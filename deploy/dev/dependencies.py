"""Checks dependencies with cargo-deny: licences, versions, sources and, if a local copy exists, security advisories."""

import os
from pathlib import Path

from . import cargotools, layout, processes
from .terminal import Step, note


def check() -> None:
    """Raises a Problem if a dependency violates deny.toml."""
    program = cargotools.program("cargo-deny")
    log = layout.LOGS / "test" / "dependencies.log"

    def run(step, mode: str, *checks: str) -> None:
        command = [program, mode, "--all-features", "check", "--hide-inclusion-graph", *checks]
        processes.run(step, command, log, cwd=layout.ROOT)

    has_advisories = _advisories()
    with Step("dependencies: licences, versions, sources") as step:
        run(step, "--locked", "licenses", "bans", "sources")
        if has_advisories:
            # The local copy of the advisories is not updated, because tests do not access the network.
            run(step, "--offline", "advisories")
        step.done()
    if not has_advisories:
        note(
            "Dependencies were not checked for known vulnerabilities: there is no local copy of the RustSec advisories.\n"
            f"To fetch one for future runs: {program} fetch db"
        )


def _advisories() -> bool:
    """Whether a local copy of the RustSec advisories exists."""
    home = Path(os.environ.get("CARGO_HOME") or Path.home() / ".cargo")
    return any((home / "advisory-dbs").glob("*/crates"))
