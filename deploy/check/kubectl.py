"""Provides kubectl, whose kustomize renders overlays offline."""

import re
import shutil
import subprocess
from pathlib import Path

from dev import apt, layout, tools

# The first Debian release whose kubectl supports components and the field `labels`. The kubectl of bookworm is from
# 2021.
SUITE = "forky"
LEAST = (1, 27)


def program() -> Path:
    """Returns the path of kubectl: from PATH if it is new enough, otherwise from a Debian package unpacked into the cache of ./dev."""
    found = shutil.which("kubectl")
    if found and version(found) >= LEAST:
        return Path(found)
    cached = tools.layout.tools() / "kubectl" / "kubectl"
    if not cached.exists():
        with tools.installing():
            partial = cached.parent.with_name(".kubectl.partial")
            shutil.rmtree(partial, ignore_errors=True)
            unpacked = apt.fetch("kubectl", SUITE, partial, layout.LOGS / "kubectl.log")
            cached.parent.mkdir(parents=True, exist_ok=True)
            (unpacked / "usr/bin/kubectl").rename(cached)
            shutil.rmtree(partial)
    return cached


def version(kubectl: str):
    said = subprocess.run([kubectl, "version", "--client"], capture_output=True, text=True).stdout
    match = re.search(r"v(\d+)\.(\d+)", said)
    return (int(match[1]), int(match[2])) if match else (0, 0)
