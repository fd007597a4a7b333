import gzip
import subprocess
import tempfile
import unittest
from pathlib import Path

from dev import guest


def module(*names: str) -> bytes:
    return b"\x7fELF...\0license=GPL\0depends=" + ",".join(names).encode() + b"\0name=x\0"


class Modules(unittest.TestCase):
    def test_kernel_modules_are_ordered_after_their_dependencies(self):
        with tempfile.TemporaryDirectory() as folder:
            contents = {
                "virtio_net": module("net_failover", "virtio"),
                "net_failover": module("failover"),
                "failover": module(),
                "virtio": module(),
            }
            paths = {}
            for name, content in contents.items():
                paths[name] = Path(folder) / f"{name}.ko"
                paths[name].write_bytes(content)
            order = [path.stem for path in guest.in_order(paths)]
        self.assertEqual(order, ["failover", "net_failover", "virtio", "virtio_net"])

    def test_kernel_module_without_info_has_no_dependencies(self):
        self.assertEqual(guest.depends(b"\x7fELF"), [])
        self.assertEqual(guest.depends(module()), [])


class Archives(unittest.TestCase):
    def test_cpio_extracts_the_initramfs_archive(self):
        archive = guest.Archive()
        archive.folder("bin")
        archive.file("bin/tool", b"#!/bin/sh\n", 0o755)
        archive.link("bin/sh", "tool")
        with tempfile.TemporaryDirectory() as folder:
            try:
                subprocess.run(["cpio", "-idm", "--quiet"], input=archive.bytes(), cwd=folder, check=True)
            except FileNotFoundError:
                # If the cpio tool is not installed, the test checks only the magic number.
                self.assertTrue(archive.bytes().startswith(b"070701"))
                return
            self.assertEqual((Path(folder) / "bin/sh").readlink(), Path("tool"))
            self.assertEqual((Path(folder) / "bin/tool").read_bytes(), b"#!/bin/sh\n")
            self.assertTrue((Path(folder) / "bin/tool").stat().st_mode & 0o100)

    def test_initramfs_archive_is_reproducible(self):
        def make():
            archive = guest.Archive()
            archive.file("init", b"x", 0o755)
            return gzip.compress(archive.bytes(), mtime=0)

        self.assertEqual(make(), make())


if __name__ == "__main__":
    unittest.main()
