"""Builds a guest image of a few MB: Debian's cloud kernel, and an initramfs with busybox and the agent.

Even without KVM, the guest boots within seconds in QEMU. The only program that it runs is `vmwatch-agent`.
"""

import gzip
import hashlib
import os
import platform
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Dict, List

from . import apt, cargo, layout, processes, tools
from .terminal import Problem, Step

# Kernel modules with the drivers for the devices in deploy/guest/domain.xml. Their dependencies are found
# automatically.
MODULES = ["virtio_pci", "virtio_net", "virtio_blk", "virtio_balloon", "virtio-rng", "button", "evdev"]
# With musl, a static program resolves host names itself. With glibc it loads the libraries that /etc/nsswitch.conf names,
# and crashes if they belong to another version of glibc.
TARGET = f"{platform.machine()}-unknown-linux-musl"
PROFILE = "guest"
# Debian's metapackage, which depends on the package of the newest kernel version.
KERNEL = "linux-image-cloud-amd64"

NEEDS = [
    tools.Need("libvirt-daemon", "libvirt's daemon", lambda: shutil.which("libvirtd") is not None),
    tools.Need(
        "libvirt-daemon-driver-qemu", "libvirt's driver for QEMU",
        lambda: bool(list(Path("/usr/lib").glob("*/libvirt/connection-driver/libvirt_driver_qemu.so"))),
    ),
    tools.Need("libvirt-clients", "virsh", lambda: shutil.which("virsh") is not None),
    tools.Need("qemu-system-x86", "QEMU for x86", lambda: shutil.which("qemu-system-x86_64") is not None),
]
MUSL = tools.Need("musl-tools", "a C compiler for musl, for static programs", lambda: shutil.which("musl-gcc") is not None)


def image() -> Path:
    """Returns the folder with `vmlinuz` and `initramfs.gz`, which are built if missing or if the agent has changed."""
    tools.install_system(_needs())
    # The agent is built without holding the lock of ./dev: cargo has its own lock, and another ./dev that only installs
    # NATS need not wait.
    agent = static_agent()
    with tools.installing():
        parts = _parts()
        home = layout.cache() / "guest"
        key = hashlib.sha256()
        for content in (agent.read_bytes(), (layout.ROOT / "deploy/guest/init").read_bytes()):
            key.update(content)
        made = home / key.hexdigest()[:16]
        if not (made / "initramfs.gz").exists():
            with Step("building the guest's initramfs") as step:
                _make(parts, agent, made)
                step.done()
            _keep_newest(home, made)
    return made


def _needs() -> List[tools.Need]:
    """Returns the packages that the guest needs. Debian's QEMU conflicts with a newer qemu-utils from backports, which is downgraded."""
    query = subprocess.run(["dpkg-query", "-W", "-f", "${Version}", "qemu-utils"], capture_output=True, text=True)
    if "~bpo" not in query.stdout or all(need.present() for need in NEEDS):
        return NEEDS
    older = f"qemu-utils/{apt.codename()}"
    return [tools.Need("--allow-downgrades", "", lambda: False), tools.Need(older, older, lambda: False), *NEEDS]


def _parts() -> Path:
    """Returns the folder with the kernel and busybox, which are unpacked from Debian's packages."""
    parts = layout.tools() / "guest-parts"
    if parts.exists():
        return parts
    if not apt.is_here():
        raise Problem("the guest needs Debian's kernel packages, but this system has no apt")
    partial = parts.with_name(".guest-parts.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with Step("fetching a kernel and busybox for the guest") as step:
        packages = [_kernel_package(), "busybox-static"]
        log = layout.LOGS / "guest.log"
        processes.run(step, ["apt-get", "-q", "download", *packages], log, cwd=partial)
        for package in sorted(partial.glob("*.deb")):
            processes.run(step, ["dpkg-deb", "-x", package, partial / "root"], log, cwd=partial)
            package.unlink()
        step.done()
    (partial / "root").rename(parts)
    shutil.rmtree(partial)
    return parts


def _kernel_package() -> str:
    output = subprocess.run(["apt-cache", "depends", KERNEL], capture_output=True, text=True).stdout
    for line in output.splitlines():
        word = line.split()[-1] if line.split() else ""
        if word.startswith("linux-image-") and word != KERNEL:
            return word
    raise Problem(f"apt does not know the package {KERNEL}", "Run `apt-get update`, then try again.")


def static_agent() -> Path:
    return static_program("agent", "vmwatch-agent")


def static_program(crate: str, program: str) -> Path:
    """Builds a statically linked program and returns its path."""
    command = ["cargo", "build", "-p", crate, "--bin", program, "--profile", PROFILE, "--target", TARGET, "--target-dir", objects()]
    tools.install_system([MUSL])
    cargo.add_target(TARGET)
    with Step(f"building a static {program}") as step:
        log = layout.LOGS / f"static-{program}.log"
        processes.run(step, command, log, cargo.progress, env=cargo.environment(), cwd=layout.ROOT)
        step.done()
    return objects() / TARGET / PROFILE / program


def objects() -> Path:
    """Returns the target folder of the static programs."""
    return layout.cache() / "build" / "guest"


def _make(parts: Path, agent: Path, made: Path) -> None:
    partial = made.with_name(made.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shutil.copyfile(next(parts.glob("boot/vmlinuz-*")), partial / "vmlinuz")
    busybox = next(path for path in (parts / "bin/busybox", parts / "usr/bin/busybox") if path.exists())
    archive = Archive()
    for folder in ("bin", "modules"):
        archive.folder(folder)
    archive.file("init", (layout.ROOT / "deploy/guest/init").read_bytes(), 0o755)
    archive.file("bin/busybox", busybox.read_bytes(), 0o755)
    archive.link("bin/sh", "busybox")
    archive.file("bin/vmwatch-agent", agent.read_bytes(), 0o755)
    modules = in_order({path.stem.replace("-", "_"): path for path in parts.glob("lib/modules/*/kernel/**/*.ko")})
    for path in modules:
        archive.file(f"modules/{path.name}", path.read_bytes())
    archive.file("modules/order", "".join(path.name + "\n" for path in modules).encode())
    # The archive has no time stamp, so equal contents give an identical file.
    (partial / "initramfs.gz").write_bytes(gzip.compress(archive.bytes(), mtime=0))
    partial.rename(made)


def in_order(modules: Dict[str, Path]) -> List[Path]:
    """Returns the files of the required modules, each after its dependencies. Modules without a file are built into the kernel."""
    ordered: List[Path] = []

    def add(name: str) -> None:
        path = modules.get(name.replace("-", "_"))
        if path is None or path in ordered:
            return
        for needed in depends(path.read_bytes()):
            add(needed)
        ordered.append(path)

    for name in MODULES:
        add(name)
    return ordered


def depends(module: bytes) -> List[str]:
    """Returns the dependencies of a kernel module, which its NUL-separated module info contains as `depends=a,b`."""
    start = module.find(b"\0depends=")
    if start < 0:
        return []
    end = module.index(b"\0", start + 1)
    names = module[start + len(b"\0depends="):end].decode()
    return [name for name in names.split(",") if name]


class Archive:
    """A cpio archive in the kernel's `newc` format (Documentation/driver-api/early-userspace)."""

    def __init__(self) -> None:
        self._out = bytearray()
        self._inode = 0

    def folder(self, name: str) -> None:
        self._entry(name, stat.S_IFDIR | 0o755, b"")

    def file(self, name: str, content: bytes, mode: int = 0o644) -> None:
        self._entry(name, stat.S_IFREG | mode, content)

    def link(self, name: str, target: str) -> None:
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def bytes(self) -> bytes:
        end = Archive()
        end._entry("TRAILER!!!", 0, b"")
        return bytes(self._out + end._out)

    def _entry(self, name: str, mode: int, content: bytes) -> None:
        self._inode += 1
        # The fields are: ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor,
        # namesize, check.
        numbers = [self._inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0]
        self._out += b"070701" + b"".join(b"%08X" % number for number in numbers)
        self._out += name.encode() + b"\0"
        self._pad()
        self._out += content
        self._pad()

    def _pad(self) -> None:
        self._out += b"\0" * (-len(self._out) % 4)


def _keep_newest(home: Path, newest: Path) -> None:
    """Deletes the images of older agents, except the newest of them, which a running stack may still use."""
    older = sorted((path for path in home.iterdir() if path != newest), key=os.path.getmtime)
    for path in older[:-1]:
        shutil.rmtree(path, ignore_errors=True)
