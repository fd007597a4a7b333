"""Prints the figures that tests measured at the end of a run, and writes them to a file with `--json FILE`."""

import json
import os
import tempfile
from pathlib import Path

from .terminal import EX_USAGE, Problem, say, style, table


def option(arguments: list, name: str):
    """Removes `name VALUE` or `name=VALUE` from the arguments. Returns the value or None, and the other arguments."""
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
    """A context manager that collects the figures measured by tests that run with `environment()`."""

    def __init__(self, target):
        self.target = Path(target) if target else None
        if self.target and not self.target.parent.is_dir():
            raise Problem(f"--json: the folder {self.target.parent} does not exist", code=EX_USAGE)

    def __enter__(self):
        descriptor, self._lines = tempfile.mkstemp(prefix="vmwatch-figures-")
        os.close(descriptor)
        return self

    def __exit__(self, *_):
        figures = self.read()
        os.unlink(self._lines)
        if figures:
            say(f"\n{style('measured', 'strong')}")
            say(table([("  " + name, _number(value)) for name, value in figures.items()]))
        if self.target:
            self.target.write_text(json.dumps({"figures": figures}, indent=2) + "\n")

    def environment(self) -> dict:
        """Returns the environment variable with the path of the file to which tests append one JSON object per line."""
        return {"VMWATCH_FIGURES": self._lines}

    def read(self) -> dict:
        """Returns the figures by name; if a name occurs twice, the later figure is returned."""
        with open(self._lines, encoding="utf-8") as lines:
            figures = [json.loads(line) for line in lines]
        values = {figure["name"]: figure["value"] for figure in figures}
        return dict(sorted(values.items()))


def record(name: str, value: float) -> None:
    """Prints a figure and appends it to the file that `environment()` names, like testkit/src/figures.rs."""
    print(f"figure {name} {value}")
    lines = os.environ.get("VMWATCH_FIGURES")
    if lines:
        with open(lines, "a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, "value": value}) + "\n")


def _number(value: float) -> str:
    return f"{value:,.3f}".rstrip("0").rstrip(".")
