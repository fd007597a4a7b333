"""Builds container images: a base image from Debian packages, those of deploy/Dockerfile, and stand-ins for the images nats and mongo."""

import os
import shutil
import subprocess
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Dict

from dev import apt, layout, processes, tools, web
from dev.terminal import Problem, Step, say, table

from .engine import LABEL, LOGS, STEP_LIMIT, Engine

PROGRAMS = ["gateway", "auth", "metrics", "lifecycle", "alert", "agent"]
# The packages that deploy/Dockerfile installs, and busybox, because the stand-ins need its wget.
BASE_PACKAGES = "ca-certificates,libvirt0,busybox-static"
STANDIN = Path(__file__).parent / "standin"
# The newest version of MongoDB's shell that runs with Node.js 20. It executes deploy/mongo/users.js.
MONGOSH = "mongosh@2"
# Time limit in seconds for downloads, which may be slow.
FETCH_LIMIT = 600.0


@dataclass(frozen=True)
class StandIns:
    """Returns the variables of compose.yaml that select the stand-in images."""

    variables: Dict[str, str]


def base(engine: Engine) -> str:
    """Creates a base image of this machine's Debian release, because the binaries are linked with its libraries. Returns its tag."""
    release = apt.codename()
    # The tag depends on the list of packages, so a changed list produces a new image.
    tag = f"vmwatch-offline/debian:{release}-{zlib.crc32(BASE_PACKAGES.encode()):08x}"
    if engine.has_image(tag):
        return tag
    if not apt.is_here() or os.geteuid() != 0:
        raise Problem("creating a base image requires root on Debian", "Run this as root.")
    root = layout.DOT / "offline" / "base"
    shutil.rmtree(root, ignore_errors=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    mirror = next(source.uri for source in apt.sources() if source.serves_release(release))
    with Step(f"making a base image of Debian {release} (debootstrap)") as step:
        command = ["debootstrap", "--variant=minbase", f"--include={BASE_PACKAGES}", release, root, mirror]
        processes.run(step, command, LOGS / "debootstrap.log", limit=FETCH_LIMIT)
        archive = subprocess.Popen(["tar", "--create", "--directory", root, "."], stdout=subprocess.PIPE)
        engine.run("import", "-", tag, stdin=archive.stdout)
        if archive.wait() != 0:
            raise Problem("the base image could not be packed")
        step.done(tag)
    shutil.rmtree(root)
    return tag


def ours(engine: Engine, debian: str, binaries: Path) -> None:
    """Builds the last stages of deploy/Dockerfile with the given binaries, without compiling in the image."""
    context = layout.DOT / "offline" / "context"
    shutil.rmtree(context, ignore_errors=True)
    (context / "deploy").mkdir(parents=True)
    shutil.copytree(binaries, context / "bin")
    shutil.copytree(layout.ROOT / "deploy" / "image", context / "deploy" / "image")
    for name in PROGRAMS:
        engine.step(
            f"building the image of {name}", f"image-{name}",
            "build", "--file", layout.ROOT / "deploy" / "Dockerfile", "--target", name,
            "--build-arg", "BINARIES=prebuilt", "--build-arg", f"DEBIAN_IMAGE={debian}",
            "--label", LABEL, "--tag", f"vmwatch/{name}:offline", context,
        )


def standins(engine: Engine, debian: str) -> StandIns:
    """Builds images that contain the servers installed by ./dev and can replace the official images."""
    nats = layout.DOT / "offline" / "nats"
    database = layout.DOT / "offline" / "mongo"
    for folder in (nats, database):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    shutil.copy(tools.nats_server(), nats / "nats-server")
    server = tools.database().program
    if server.name != tools.STAND_IN_PROGRAM:
        raise Problem(f"the stand-in for mongo is built from {tools.STAND_IN}, not from {server}", "Remove mongod from PATH.")
    shutil.copy(server, database / "database")
    shutil.copy(STANDIN / "docker-entrypoint.sh", database)
    shutil.copy(shell(), database / "mongosh.tar")
    tags = {}
    for name, folder in (("nats", nats), ("mongo", database)):
        tag = f"vmwatch-offline/{name}"
        engine.step(
            f"building the stand-in for {name}", f"image-{name}",
            "build", "--file", STANDIN / f"{name}.Dockerfile", "--build-arg", f"DEBIAN_IMAGE={debian}",
            "--label", LABEL, "--tag", tag, folder,
        )
        tags[f"VMWATCH_{name.upper()}_IMAGE"] = tag
    return StandIns(tags)


def shell() -> Path:
    """Returns an archive with Node.js and MongoDB's shell (20,000 files), which is created once in the cache of ./dev."""
    archive = tools.layout.tools() / f"{MONGOSH}.tar"
    node = web.node()
    if not archive.exists():
        with tools.installing(), Step("installing mongosh") as step:
            partial = archive.with_name(".mongosh.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            shutil.copy(node, partial / "node")
            npm = [*web.npm(), "install", "--no-audit", "--no-fund", "--omit=optional", "--ignore-scripts", MONGOSH]
            processes.run(step, npm, LOGS / "mongosh.log", cwd=partial, env=dict(os.environ), limit=FETCH_LIMIT)
            packed = archive.with_suffix(".partial")
            tar = ["tar", "--create", "--file", packed, "--directory", partial, "node", "node_modules"]
            processes.run(step, tar, LOGS / "mongosh-tar.log", limit=STEP_LIMIT)
            packed.rename(archive)
            shutil.rmtree(partial)
            step.done()
    return archive


def sizes(engine: Engine) -> None:
    """Prints the sizes of the images, as `docker images` counts them."""
    rows = []
    for name in PROGRAMS:
        size = int(engine.run("image", "inspect", "--format", "{{.Size}}", f"vmwatch/{name}:offline").stdout)
        rows.append((f"  vmwatch/{name}", f"{size / 1e6:.1f} MB"))
    say("\nSizes of the images\n" + table(rows) + "\n")
