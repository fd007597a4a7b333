"""cargo-deny: licences, versions and sources of what is built in, and known holes where their list is at hand."""

import os
from pathlib import Path

from . import cargotools, layout, processes
from .terminal import Step, note


def check() -> None:
    """Fails on what deny.toml does not allow."""
    program = cargotools.program("cargo-deny")
    log = layout.LOGS / "test" / "dependencies.log"

    def run(step, mode: str, *checks: str) -> None:
        command = [program, mode, "--all-features", "check", "--hide-inclusion-graph", *checks]
        processes.run(step, command, log, cwd=layout.ROOT)

    known_holes = _advisories()
    with Step("dependencies: licences, versions, sources") as step:
        run(step, "--locked", "licenses", "bans", "sources")
        if known_holes:
            # As the copy is: nothing is fetched during a test.
            run(step, "--offline", "advisories")
        step.done()
    if not known_holes:
        note(
            "Known holes of dependencies were not looked for: there is no copy of RustSec's list here. With a network,\n"
            f"`{program} fetch db` brings one; it is used from then on."
        )


def _advisories() -> bool:
    """Whether a copy of RustSec's list was fetched once."""
    home = Path(os.environ.get("CARGO_HOME") or Path.home() / ".cargo")
    return any((home / "advisory-dbs").glob("*/crates"))
