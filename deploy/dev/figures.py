"""What tests measured: shown at the end of a run, and written where `--json FILE` says."""

import json
import os
import tempfile
from pathlib import Path

from .terminal import EX_USAGE, Problem, say, style, table


def option(arguments: list, name: str):
    """Takes `name VALUE` or `name=VALUE` out of the arguments: its value, or None, and the others."""
    value, others, waiting = None, [], False
    for argument in arguments:
        if waiting:
            value, waiting = argument, False
        elif argument == name:
            waiting = True
        elif argument.startswith(name + "="):
            value = argument.partition("=")[2]
        else:
            others.append(argument)
    if waiting or value == "":
        raise Problem(f"{name} needs a value", code=EX_USAGE)
    return value, others


class Figures:
    """Collects the figures of what runs with `environment()`, while it is entered."""

    def __init__(self, target):
        self.target = Path(target) if target else None
        if self.target and not self.target.parent.is_dir():
            raise Problem(f"--json: there is no folder {self.target.parent}", code=EX_USAGE)

    def __enter__(self):
        descriptor, self._lines = tempfile.mkstemp(prefix="vmwatch-figures-")
        os.close(descriptor)
        return self

    def __exit__(self, *_):
        figures = self.read()
        os.unlink(self._lines)
        if figures:
            say(f"\n{style('figures', 'strong')}")
            say(table([("  " + name, _number(value)) for name, value in figures.items()]))
        if self.target:
            self.target.write_text(json.dumps({"figures": figures}, indent=2) + "\n")

    def environment(self) -> dict:
        """For the tests, which append an object a line."""
        return {"VMWATCH_FIGURES": self._lines}

    def read(self) -> dict:
        """By name; of a figure that was measured twice the last."""
        with open(self._lines, encoding="utf-8") as lines:
            figures = [json.loads(line) for line in lines]
        values = {figure["name"]: figure["value"] for figure in figures}
        return dict(sorted(values.items()))


def _number(value: float) -> str:
    return f"{value:,.3f}".rstrip("0").rstrip(".")
