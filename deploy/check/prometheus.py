"""Provides promtool, which checks alert rules and runs their tests."""

import shutil
from pathlib import Path

from dev import apt, layout, tools


def program() -> Path:
    """Returns the path of promtool: from PATH, otherwise from Debian's prometheus package unpacked into the cache of ./dev."""
    found = shutil.which("promtool")
    if found:
        return Path(found)
    cached = tools.layout.tools() / "promtool" / "promtool"
    if not cached.exists():
        with tools.installing():
            partial = cached.parent.with_name(".promtool.partial")
            shutil.rmtree(partial, ignore_errors=True)
            unpacked = apt.fetch("prometheus", apt.codename(), partial, layout.LOGS / "promtool.log")
            cached.parent.mkdir(parents=True, exist_ok=True)
            (unpacked / "usr/bin/promtool").rename(cached)
            shutil.rmtree(partial)
    return cached
