"""The command line of deploy/offline/run, which builds the images and runs the scenario and the end-to-end tests."""

import argparse
import contextlib
import shutil
from pathlib import Path

from dev import cargo, interrupts, layout, processes, tools, web
from dev.terminal import Problem, Step, tell, warn

from . import backend, images, scenario
from .engine import Engine


def main(arguments) -> int:
    parser = argparse.ArgumentParser(
        prog="deploy/offline/run",
        description="Builds the images from locally built binaries, with stand-ins for nats and mongo from Debian "
        "packages. Then runs compose.yaml with them: health, the documented methods, backup and restore, --scale, rolling "
        "restarts under load. Then runs end-to-end tests with NATS and MongoDB in containers. If no Docker engine answers, "
        "installs and starts one, which needs root.",
    )
    parser.add_argument("--release", action="store_true", help="build optimised binaries, to measure the sizes of the images")
    parser.add_argument("--binaries", type=Path, metavar="FOLDER", help="use the binaries in this folder instead of building them")
    parser.add_argument(
        "--if-possible", action="store_true", help="without a Docker engine or base image, print a warning and exit with 0"
    )
    parser.add_argument("--images-only", action="store_true", help="build the images, print their sizes, and exit")
    options = parser.parse_args(arguments)
    # SIGTERM is handled as well, so everything that was started is also removed on SIGTERM.
    interrupts.install()
    try:
        return run(options)
    except Problem as problem:
        tell(problem)
        return problem.code
    except KeyboardInterrupt:
        return 130


def run(options) -> int:
    with contextlib.ExitStack() as stack:
        try:
            engine = stack.enter_context(Engine.answering())
            base = images.base(engine)
            images.shell()
        except Problem as problem:
            if not options.if_possible:
                raise
            warn(f"NOT TESTED: images, compose.yaml and servers in containers: {problem}")
            return 0
        images.ours(engine, base, stripped(options.binaries or build(options.release)))
        standins = images.standins(engine, base)
        images.sizes(engine)
        if options.images_only:
            return 0
        failed = scenario.run(engine, standins)
        # The end-to-end tests use binaries of their own build profile, whatever the images contain.
        backend.run(engine, standins)
        return failed


def build(release: bool) -> Path:
    """Builds the binaries and returns their folder."""
    cargo.check()
    web.build()
    tools.install_system(tools.BUILD_NEEDS)
    profile = ["--release"] if release else []
    with Step("building " + ("optimised binaries" if release else "binaries")) as step:
        command = ["cargo", "build", "--workspace", "--bins", *profile]
        processes.run(
            step, command, layout.LOGS / "offline" / "build.log", cargo.progress,
            env=cargo.environment(), cwd=layout.ROOT,
        )
        step.done()
    return cargo.target_folder().with_name("release" if release else cargo.PROFILE_FOLDER)


def stripped(built: Path) -> Path:
    """Copies the binaries without debug information, which takes 70 of 100 MB in a debug build. Returns the folder."""
    tools.install_system([tools.Need("binutils", "strip", lambda: shutil.which("strip") is not None)])
    folder = layout.DOT / "offline" / "bin"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with Step("copying the binaries") as step:
        for name in images.PROGRAMS:
            command = ["strip", "-o", folder / f"vmwatch-{name}", built / f"vmwatch-{name}"]
            processes.run(step, command, layout.LOGS / "offline" / "strip.log")
        step.done(layout.short(folder))
    return folder
