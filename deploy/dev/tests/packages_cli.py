"""Builds the package of the command line, and installs and purges it in a container."""

import re
import subprocess
import tempfile
import unittest
from pathlib import Path

from dev import layout, package
from dev.tests import container

PROGRAM = "/usr/bin/vmwatch"
PAGE = "/usr/share/man/man1/vmwatch.1.gz"
COMPLETIONS = {
    "bash": "/usr/share/bash-completion/completions/vmwatch",
    "zsh": "/usr/share/zsh/vendor-completions/_vmwatch",
    "fish": "/usr/share/fish/vendor_completions.d/vmwatch.fish",
}
COPYRIGHT = "/usr/share/doc/vmwatch-cli/copyright"


def output(*command) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def setUpModule():
    global FOLDER, BUILT
    folder = tempfile.TemporaryDirectory()
    unittest.addModuleCleanup(folder.cleanup)
    FOLDER = Path(folder.name)
    BUILT = package.build_cli(FOLDER)


class Package(unittest.TestCase):
    """The package as files."""

    def test_package_has_the_program_completions_and_manual(self):
        files = {}
        for line in output("dpkg-deb", "--contents", BUILT).splitlines():
            mode, owners, _size, _day, _time, path = line.split(maxsplit=5)
            if not mode.startswith("d"):
                files[path.lstrip(".")] = mode
                self.assertIn(owners, ("root/root", "0/0"), path)
        data = {path: "-rw-r--r--" for path in (PAGE, COPYRIGHT, *COMPLETIONS.values())}
        self.assertEqual(files, {PROGRAM: "-rwxr-xr-x", **data})

    def test_program_needs_no_other_package(self):
        self.assertEqual(output("dpkg-deb", "--field", BUILT, "Depends").strip(), "")
        unpacked = FOLDER / "files"
        subprocess.run(["dpkg-deb", "--extract", BUILT, unpacked], check=True)
        headers = output("readelf", "--program-headers", unpacked / PROGRAM.lstrip("/"))
        self.assertNotIn("INTERP", headers, "the program is not linked statically")

    def test_manual_describes_each_command(self):
        unpacked = FOLDER / "manual"
        subprocess.run(["dpkg-deb", "--extract", BUILT, unpacked], check=True)
        shown = output(unpacked / PROGRAM.lstrip("/"), "help")
        listed = shown.partition("Commands:\n")[2].partition("\n\n")[0]
        commands = re.findall(r"(?m)^  ([a-z-]+)  ", listed)
        self.assertIn("who-ran", commands)
        manual = (layout.ROOT / "deploy/package/vmwatch.1").read_text()
        self.assertEqual(set(re.findall(r"Cm ([a-z-]+)", manual)) - {"remove"}, set(commands))
        codes = shown.partition("Exit codes:\n")[2]
        self.assertEqual(re.findall(r"(?m)^\.It (\d+)$", manual), re.findall(r"(?m)^  (\d+) ", codes))


@unittest.skipUnless(container.possible(), "containers need root and apt")
class Installed(unittest.TestCase):
    def test_package_is_installed_and_purged(self):
        machine = container.Container(FOLDER)
        self.addCleanup(machine.stop)
        machine.run("dpkg", "--install", "/shared/vmwatch-cli.deb")
        with self.subTest("a user without rights can run the program"):
            user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "env", "HOME=/nonexistent"]
            shown = machine.run(*user, "vmwatch", "vms", check=False)
            self.assertEqual(shown.returncode, 64, shown.stdout)
            self.assertIn("no gateway is chosen; run `vmwatch login URL`", shown.stdout)
            gone = machine.run(*user, "VMWATCH_TOKEN=x", "vmwatch", "vms", "--url", "http://localhost:9", check=False)
            self.assertEqual(gone.returncode, 69, gone.stdout)
            self.assertIn("http://localhost:9 cannot be reached", gone.stdout)
        with self.subTest("bash completes a command"):
            call = 'COMP_WORDS=(vmwatch who); COMP_CWORD=1; _vmwatch vmwatch who vmwatch; echo "$COMPREPLY"'
            self.assertEqual(machine.run("bash", "-c", f"source {COMPLETIONS['bash']}; {call}").stdout.strip(), "who-ran")
        with self.subTest("a purge leaves nothing"):
            machine.run("dpkg", "--purge", "vmwatch-cli")
            left = machine.run("find", "/", "-xdev", "-name", "*vmwatch*", "-not", "-path", "/proc/*").stdout.split()
            self.assertEqual(left, [])


if __name__ == "__main__":
    unittest.main()
