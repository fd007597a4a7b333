"""Output functions: colours (only on a terminal), tables, progress lines, and error messages with advice."""

import os
import shutil
import sys
import time

# The exit code EX_USAGE of sysexits.h, for invalid arguments.
EX_USAGE = 64

# Interval in seconds at which a step reports progress if the output is not a terminal.
PLAIN_INTERVAL = 15.0
# A step that takes fewer seconds than this is reported only when it is done.
SILENT = 2.0


class Problem(Exception):
    """An error for the user, with advice on what to do. It is shown without a traceback."""

    def __init__(self, what: str, todo: str = "", code: int = 1):
        super().__init__(what)
        self.todo = todo
        self.code = code


def on_terminal(stream) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def coloured(stream=None) -> bool:
    # https://no-color.org: a non-empty NO_COLOR disables colours.
    return on_terminal(stream or sys.stdout) and not os.environ.get("NO_COLOR")


_STYLES = {"good": "32", "bad": "31", "warn": "33", "faint": "2", "strong": "1"}


def style(text: str, name: str, stream=None) -> str:
    return f"\x1b[{_STYLES[name]}m{text}\x1b[0m" if coloured(stream) else text


def say(text: str = "") -> None:
    print(text, flush=True)


def note(text: str) -> None:
    say(style(text, "faint"))


def warn(text: str) -> None:
    say(style(text, "warn"))


def tell(problem: Problem) -> None:
    print(style(f"dev: {problem}", "bad", sys.stderr), file=sys.stderr, flush=True)
    if problem.todo:
        print(problem.todo, file=sys.stderr, flush=True)


def table(rows, styles=None) -> str:
    """Formats rows as a table with aligned columns. `styles[i]` is the style of row i."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    lines = []
    for index, row in enumerate(rows):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
        name = (styles or {}).get(index)
        lines.append(style(line, name) if name else line)
    return "\n".join(lines)


def seconds(value: float) -> str:
    if value < 60:
        return f"{value:.1f} s"
    return f"{int(value) // 60} min {int(value) % 60:02} s"


class Step:
    """Shows a step with its duration: on a terminal in a line that is updated, otherwise in a new line every 15 s."""

    def __init__(self, title: str):
        self.title = title
        self.began = time.monotonic()
        self._live = on_terminal(sys.stdout)
        self._next_plain = self.began + SILENT
        self._last_drawn = 0.0

    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def tick(self, detail: str = "") -> None:
        now = time.monotonic()
        if self._live and now - self._last_drawn >= 0.1:
            self._last_drawn = now
            self._draw(f"{self.title}  {int(self.elapsed())} s  {detail}")
        elif not self._live and now >= self._next_plain:
            first = self._next_plain == self.began + SILENT
            self._next_plain = self.began + PLAIN_INTERVAL if first else now + PLAIN_INTERVAL
            text = f"{self.title} ..." if first else f"{self.title}: {int(self.elapsed())} s"
            say(f"{text}  {detail}".rstrip())

    def done(self, result: str = "") -> None:
        self._clear()
        mark = style("ok", "good")
        say(f"{mark}  {self.title}  {style(seconds(self.elapsed()), 'faint')}  {result}".rstrip())

    def failed(self) -> None:
        self._clear()
        say(f"{style('--', 'bad')}  {self.title}: failed after {seconds(self.elapsed())}")

    def _draw(self, text: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        sys.stdout.write(f"\r\x1b[K{text[:width]}")
        sys.stdout.flush()

    def _clear(self) -> None:
        if self._live:
            sys.stdout.write("\r\x1b[K")

    def __enter__(self):
        return self

    def __exit__(self, kind, _error, _trace):
        if kind is not None:
            self.failed()
