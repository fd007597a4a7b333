"""The order of it all, and its arguments."""

import argparse
import shutil
from pathlib import Path

from dev import cargo, layout, processes, tools
from dev.terminal import Problem, Step, tell

from . import images, scenario
from .engine import Engine


def main(arguments) -> int:
    parser = argparse.ArgumentParser(
        prog="deploy/offline/run",
        description="Builds the images from binaries that lie here, with stand-ins for nats and mongo from Debian's "
        "packages, and runs compose.yaml with them: health, the documented methods, --scale, a rolling restart under "
        "load. Installs and starts Docker where none answers, which needs root.",
    )
    parser.add_argument("--release", action="store_true", help="of optimised binaries, whose sizes count")
    parser.add_argument("--binaries", type=Path, metavar="FOLDER", help="instead of building, take those of this folder")
    parser.add_argument("--images-only", action="store_true", help="build the images, tell their sizes, and stop")
    options = parser.parse_args(arguments)
    try:
        return run(options)
    except Problem as problem:
        tell(problem)
        return problem.code


def run(options) -> int:
    binaries = stripped(options.binaries or build(options.release))
    with Engine.answering() as engine:
        base = images.base(engine)
        images.ours(engine, base, binaries)
        standins = images.standins(engine, base)
        images.sizes(engine)
        if options.images_only:
            return 0
        return scenario.run(engine, standins)


def build(release: bool) -> Path:
    """The folder of our binaries, built now."""
    cargo.check()
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
    """Copies without debug information, which is 70 of 100 MB; an optimised build has none left."""
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
