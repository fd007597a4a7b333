"""The hypervisor of `up --guest`: libvirtd in session mode, with one real QEMU VM that is switched off. The VM contains the
agent, which does not run with the option --no-agent.

The end-to-end tests run a hypervisor in the same way (testkit/src/libvirtd.rs).
"""

import gzip
import json
import os
import shutil
import subprocess
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Optional

from . import layout
from .guest import Archive
from .processes import Identity, ended_how
from .terminal import Problem

# User id of `nobody` on Debian. QEMU needs no further permissions, and libvirtd in session mode must not run as root.
NOBODY = 65_534
# There is no AppArmor profile and no virtlogd, because only the system's libvirtd has them.
QEMU_CONF = 'security_driver = "none"\nstdio_handler = "file"\n'
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# The address at which guests in QEMU's user-mode network reach the host's loopback interface.
HOST_OF_GUEST = "10.0.2.2"
NAME = "guest"
VIRSH_LIMIT = 30


@dataclass(frozen=True)
class Hypervisor:
    """The hypervisor's files. They are not in the stack's folder, because `nobody` cannot enter a home folder and socket
    paths are limited to 108 bytes (unix(7))."""

    folder: str
    # Instance id of the guest. Each `up --guest` creates a new VM.
    instance: str
    with_agent: bool = True

    @classmethod
    def prepare(cls, image: Path, with_agent: bool) -> "Hypervisor":
        """Creates the files for libvirtd. `image` is the folder with the guest's kernel and initramfs."""
        made = cls(tempfile.mkdtemp(prefix="vmwatch-guest-"), str(uuid.uuid4()), with_agent)
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
    def identity(self) -> Path:
        """The folder with the identity of the guest's agent, which ./dev enrols before the guest is started."""
        return Path(self.folder) / "identity"

    @property
    def console(self) -> Path:
        return Path(self.folder) / "home" / "console"

    def command(self) -> list:
        user = ["setpriv", "--reuid", NOBODY, "--regid", NOBODY, "--clear-groups", "--"]
        return [*(user if os.geteuid() == 0 else []), "libvirtd"]

    def environment(self) -> Dict[str, str]:
        return {"PATH": PATH, "HOME": f"{self.folder}/home", "XDG_RUNTIME_DIR": f"{self.folder}/run"}

    def install_identity(self, bus_port: int) -> None:
        """Appends the identity to the guest's initramfs. In the guest, the NATS server at this port has another address than
        at the enrolment. What the platform of this machine says, where the agent was enrolled, does not apply to the guest."""
        record = json.loads((self.identity / "enrollment.json").read_text())
        record["answer"]["nats_urls"] = [f"nats://{HOST_OF_GUEST}:{bus_port}"]
        record.pop("platform", None)
        archive, inside = Archive(), "var/lib/vmwatch-agent/identity"
        parts = inside.split("/")
        for end in range(1, len(parts) + 1):
            archive.folder("/".join(parts[:end]))
        archive.file(f"{inside}/enrollment.json", json.dumps(record).encode(), 0o600)
        archive.file(f"{inside}/agent.seed", (self.identity / "agent.seed").read_bytes(), 0o600)
        path = Path(self.folder) / "image" / "initramfs.gz"
        # The file contains the seed now, and only QEMU's user may read it.
        path.chmod(0o600)
        if os.geteuid() == 0:
            os.chown(path, NOBODY, NOBODY)
        # The kernel unpacks archives that follow each other.
        with open(path, "ab") as initramfs:
            initramfs.write(gzip.compress(archive.bytes(), mtime=0))

    def define(self, settings: Dict[str, str]) -> None:
        """Defines the VM in libvirt. Its agent, if it has one, gets these settings."""
        words = [f"vmwatch.{name[len('VMWATCH_'):]}={value}" for name, value in settings.items()]
        if not self.with_agent:
            words = ["vmwatch.agent=none"]
        domain = (layout.ROOT / "deploy/guest/domain.xml").read_text()
        for name, value in {
            "name": NAME, "uuid": self.instance, "image": f"{self.folder}/image",
            "settings": " ".join(words), "console": str(self.console),
        }.items():
            domain = domain.replace("{" + name + "}", value)
        file = Path(self.folder) / "guest.xml"
        file.write_text(domain)
        # libvirtd answers only after it has started its drivers.
        self._virsh("define", str(file))

    def _virsh(self, *arguments: str) -> None:
        try:
            virsh = subprocess.run(
                ["virsh", "--quiet", "--connect", self.uri, *arguments],
                stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=VIRSH_LIMIT,
            )
        except subprocess.TimeoutExpired:
            raise Problem(f"libvirtd did not answer within {VIRSH_LIMIT} s", "See ./dev logs libvirtd.") from None
        if virsh.returncode != 0:
            raise Problem(
                f"`virsh {' '.join(arguments)}` failed with {ended_how(virsh.returncode)}",
                f"Its error output: {virsh.stderr.strip()}\nSee ./dev logs libvirtd.",
            )

    def qemu(self) -> Optional[Identity]:
        """Returns the guest's QEMU process, or None while the guest is off. QEMU keeps running if libvirtd is killed."""
        try:
            pid = int(Path(f"{self.folder}/run/libvirt/qemu/run/{NAME}.pid").read_text())
            found = Identity.of(pid)
            # The command line is compared because an unrelated process may have reused the pid.
            ours = self.folder.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return None
        return found if ours else None

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
