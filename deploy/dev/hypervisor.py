"""A hypervisor of the stack's own: libvirtd in session mode, and one real VM of QEMU that is off and has our agent in it.

The same as the end-to-end tests have (tests/src/libvirtd.rs).
"""

import os
import shutil
import subprocess
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Optional

from . import layout
from .processes import Identity, ended_how
from .terminal import Problem

# Debian's `nobody`: QEMU needs no more than this, and libvirtd in session mode wants not to be root.
NOBODY = 65_534
# No AppArmor profile, and no virtlogd, which only the system's own libvirtd has.
QEMU_CONF = 'security_driver = "none"\nstdio_handler = "file"\n'
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# This machine's loopback, as QEMU's user network shows it to its guests.
HOST_OF_GUEST = "10.0.2.2"
NAME = "guest"
VIRSH_LIMIT = 30


@dataclass(frozen=True)
class Hypervisor:
    """Its folder, which is not below the stack's own: nobody else may enter a home, and a path of a socket must be
    short (108 bytes, unix(7))."""

    folder: str
    # Of the guest, which is a new VM each time.
    instance: str

    @classmethod
    def prepare(cls, image: Path) -> "Hypervisor":
        """Makes what libvirtd needs; `image` is the guest's kernel and initramfs."""
        made = cls(tempfile.mkdtemp(prefix="vmwatch-guest-"), str(uuid.uuid4()))
        root = Path(made.folder)
        root.chmod(0o711)
        (root / "image").mkdir()
        for part in ("vmlinuz", "initramfs.gz"):
            shutil.copyfile(image / part, root / "image" / part)
        owned = [root / name for name in ("home", "home/.config", "home/.config/libvirt", "run")]
        for path in owned:
            path.mkdir()
            if os.geteuid() == 0:
                os.chown(path, NOBODY, NOBODY)
        (root / "home/.config/libvirt/qemu.conf").write_text(QEMU_CONF)
        return made

    @property
    def socket(self) -> str:
        return f"{self.folder}/run/libvirt/libvirt-sock"

    @property
    def uri(self) -> str:
        return f"qemu+unix:///session?socket={self.socket}"

    @property
    def console(self) -> Path:
        return Path(self.folder) / "home" / "console"

    def command(self) -> list:
        user = ["setpriv", "--reuid", NOBODY, "--regid", NOBODY, "--clear-groups", "--"]
        return [*(user if os.geteuid() == 0 else []), "libvirtd"]

    def environment(self) -> Dict[str, str]:
        return {"PATH": PATH, "HOME": f"{self.folder}/home", "XDG_RUNTIME_DIR": f"{self.folder}/run"}

    def define(self, bus_port: int, settings: Dict[str, str]) -> None:
        """Makes the VM known to libvirt. Its agent has these settings, and reports to the bus on this port."""
        settings = {**settings, "VMWATCH_NATS_URL": f"nats://{HOST_OF_GUEST}:{bus_port}"}
        words = [f"vmwatch.{name[len('VMWATCH_'):]}={value}" for name, value in settings.items()]
        domain = (layout.ROOT / "deploy/guest/domain.xml").read_text()
        for name, value in {
            "name": NAME, "uuid": self.instance, "image": f"{self.folder}/image",
            "settings": " ".join(words), "console": str(self.console),
        }.items():
            domain = domain.replace("{" + name + "}", value)
        file = Path(self.folder) / "guest.xml"
        file.write_text(domain)
        # libvirtd takes no request before it has started its drivers.
        self._virsh("define", str(file))

    def _virsh(self, *arguments: str) -> None:
        try:
            said = subprocess.run(
                ["virsh", "--quiet", "--connect", self.uri, *arguments],
                stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=VIRSH_LIMIT,
            )
        except subprocess.TimeoutExpired:
            raise Problem(f"libvirtd did not answer within {VIRSH_LIMIT} s", "See ./dev logs libvirtd.") from None
        if said.returncode != 0:
            raise Problem(
                f"`virsh {' '.join(arguments)}` ended with {ended_how(said.returncode)}",
                f"It said: {said.stderr.strip()}\nSee ./dev logs libvirtd.",
            )

    def qemu(self) -> Optional[Identity]:
        """The guest's process, whoever started it; nothing while it is off. It outlives a libvirtd that is killed."""
        try:
            pid = int(Path(f"{self.folder}/run/libvirt/qemu/run/{NAME}.pid").read_text())
            found = Identity.of(pid)
            # And not a process that got the id of a guest that ended.
            ours = self.folder.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return None
        return found if ours else None

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
