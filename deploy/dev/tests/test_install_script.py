"""Runs deploy/package/install.sh against a web server, with stand-ins for the programs that change a system."""

import contextlib
import hashlib
import http.server
import os
import shutil
import socket
import stat
import subprocess
import tempfile
import threading
import unittest
from email.utils import formatdate
from pathlib import Path
from time import time

from dev import layout

SCRIPT = layout.ROOT / "deploy/package/install.sh"
TOKEN = f"vmj_{'0' * 16}_{'1' * 64}"
# What the agent shows before the first sample was acknowledged.
PUBLISHED = b"vmwatch_agent_samples_total 3\nvmwatch_agent_parts_published_total 0\n"
# The real programs that the script needs.
TOOLS = ["cat", "cp", "cut", "date", "env", "grep", "mktemp", "rm", "sed", "sh", "sha256sum", "tail", "tr"]
# Each stand-in appends its name and arguments to the file `calls`, then runs these lines.
STAND_INS = {
    "id": "echo 0",
    "sleep": "",
    "journalctl": "echo 'the last line of the log'",
    "systemctl": "[ ! -e broken-unit ]",
    "apt-get": '[ ! -e broken-package ] || { echo "no space left"; exit 1; }\n: > installed\nenv > seen-environment',
    "dpkg": 'case $1 in\n--print-architecture) echo amd64 ;;\n--status) [ -e installed ] && echo "Status: install ok installed" ;;\nesac',
    "vmwatch-agent": (
        'while [ "$1" != --token-file ]; do shift; done\n'
        'cat "$2" > seen-token\nls -l "$2" > seen-mode\n'
        '[ ! -e refused ] || { echo "the join token is expired" >&2; exit 77; }\n'
        'mkdir -p state/identity\n: > state/identity/enrollment.json'
    ),
}


class Gateway(http.server.BaseHTTPRequestHandler):
    """Serves the packages of a folder, and the agent's /readyz and /metrics."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path == "/readyz":
            status, body = self.server.ready
        elif self.path == "/metrics":
            status, body = 200, self.server.metrics
        else:
            path = self.server.folder / self.path.rpartition("/")[2]
            status, body = (200, path.read_bytes()) if path.exists() else (404, b"")
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def date_time_string(self, timestamp=None):
        return formatdate(time() + self.server.ahead, usegmt=True)

    def log_message(self, *_):
        pass


class InstallScript(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.folder = Path(scratch.name)
        self.served = self.folder / "served"
        self.served.mkdir()
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Gateway)
        self.server.daemon_threads = True
        self.server.folder, self.server.ready, self.server.ahead = self.served, (200, b""), 0
        self.server.metrics = PUBLISHED.replace(b" 0", b" 12")
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.addCleanup(self.server.server_close)
        self.addCleanup(self.server.shutdown)
        self.address = f"127.0.0.1:{self.server.server_port}"
        self.url = f"http://{self.address}"
        self.packages = {"vmwatch-agent.deb": self.serve("vmwatch-agent.deb", b"a package")}
        self.make_programs(["curl"])

    def serve(self, name: str, content: bytes) -> str:
        (self.served / name).write_bytes(content)
        return hashlib.sha256(content).hexdigest()

    def make_programs(self, downloaders: list) -> None:
        self.bin = self.folder / "bin"
        shutil.rmtree(self.bin, ignore_errors=True)
        self.bin.mkdir()
        for tool in [*TOOLS, *downloaders]:
            (self.bin / tool).symlink_to(shutil.which(tool))
        for name, lines in STAND_INS.items():
            path = self.bin / name
            tools = "PATH=/usr/bin:/bin"
            path.write_text(f'#!/bin/sh\n{tools}\ncd {self.folder}\necho "{name} $*" >> calls\n{lines}\n')
            path.chmod(0o755)

    def script(self) -> str:
        text = SCRIPT.read_text().replace("@PUBLIC_URL@", self.url)
        text = text.replace("@PACKAGES@", "\n".join(f"{name} {digest}" for name, digest in self.packages.items()))
        for before, after in [
            ("/var/lib/vmwatch-agent", self.folder / "state"), ("/etc/vmwatch", self.folder / "etc"),
            ("127.0.0.1:9084", self.address), ("TRIES=60", "TRIES=3"),
        ]:
            self.assertIn(before, text)
            text = text.replace(before, str(after))
        return text

    def run_script(self, *arguments, token=TOKEN, script=None):
        """Runs the script from standard input, as `curl … | sh` does, without a terminal."""
        environment = {"PATH": str(self.bin), "TMPDIR": str(self.temporary()), **({"VMWATCH_JOIN_TOKEN": token} if token else {})}
        command = [shutil.which("sh"), "-s", "--", *arguments]
        result = subprocess.run(
            command, input=script or self.script(), env=environment, cwd=self.folder, text=True, timeout=60,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )
        self.assertEqual(list(self.temporary().iterdir()), [], "temporary files remain")
        return result

    def temporary(self) -> Path:
        path = self.folder / "temporary"
        path.mkdir(exist_ok=True)
        return path

    def fails(self, expected: str, *arguments, **options) -> str:
        result = self.run_script(*arguments, **options)
        self.assertNotEqual(result.returncode, 0, result.stdout)
        self.assertIn(expected, result.stdout)
        return result.stdout

    def succeeds(self, *arguments, **options) -> str:
        result = self.run_script(*arguments, **options)
        self.assertEqual(result.returncode, 0, result.stdout)
        return result.stdout

    def calls(self) -> list:
        """Returns the calls that changed the system, with the random name of the temporary folder replaced."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        reads = ("id ", "sleep ", "journalctl ", "dpkg --status", "dpkg --print")
        work = [part for line in lines for part in line.split() if part.startswith(str(self.temporary()))]
        text = "\n".join(line for line in lines if not line.startswith(reads))
        for path in work:
            text = text.replace(path, Path(path).name)
        return text.splitlines()

    def names(self) -> list:
        return [" ".join(call.split()[:2]) for call in self.calls()]

    def read(self, name: str) -> str:
        return (self.folder / name).read_text()

    def be_enrolled(self) -> None:
        (self.folder / "state/identity").mkdir(parents=True)
        (self.folder / "state/identity/enrollment.json").touch()
        (self.folder / "installed").touch()

    def test_new_vm_is_installed_enrolled_and_started_in_this_order(self):
        said = self.succeeds("--instance-id", "vm-1")
        options = "-o DPkg::Lock::Timeout=300 -o Dpkg::Options::=--force-confold install --yes --allow-downgrades"
        self.assertEqual(self.calls(), [
            f"apt-get {options} vmwatch-agent.deb",
            f"vmwatch-agent enroll --gateway {self.url} --token-file token --instance-id vm-1",
            "systemctl restart vmwatch-agent",
        ])
        self.assertTrue(said.endswith(f"vmwatch: done: this VM reports to {self.url}\n"), said)

    def test_token_is_only_in_a_file_of_its_owner(self):
        said = self.succeeds()
        self.assertEqual(self.read("seen-token"), f"{TOKEN}\n")
        self.assertTrue(self.read("seen-mode").startswith("-rw-------"))
        for text in (said, self.read("calls"), self.read("seen-environment")):
            self.assertNotIn("1111", text)

    def test_token_is_taken_from_a_file_or_an_argument(self):
        path = self.folder / "my-token"
        path.write_text("from a file")
        self.succeeds("--token-file", str(path), token=None)
        self.assertEqual(self.read("seen-token"), "from a file")
        shutil.rmtree(self.folder / "state")
        self.succeeds("--token", "from an argument", token=None)
        self.assertEqual(self.read("seen-token"), "from an argument\n")

    def test_without_token_and_terminal_nothing_is_downloaded(self):
        self.fails("a join token is needed: set VMWATCH_JOIN_TOKEN or use --token-file", token=None)
        self.assertEqual(self.calls(), [])

    def test_package_with_another_checksum_is_not_installed(self):
        self.serve("vmwatch-agent.deb", b"another package")
        self.fails(f"instead of {self.packages['vmwatch-agent.deb']} and was not installed")
        self.assertEqual(self.calls(), [])

    def test_incomplete_script_does_nothing(self):
        whole = self.script()
        before = whole.removesuffix('main "$@"\n')
        for length in [*range(1, len(before), 499), len(before)]:
            self.run_script(script=whole[:length])
        self.assertEqual(self.calls(), [])

    def test_package_of_this_architecture_is_preferred(self):
        self.packages["vmwatch-agent-arm64.deb"] = self.serve("vmwatch-agent-arm64.deb", b"arm64")
        self.packages["vmwatch-agent-amd64.deb"] = self.serve("vmwatch-agent-amd64.deb", b"amd64")
        self.succeeds()
        self.assertTrue(self.calls()[0].endswith(" vmwatch-agent-amd64.deb"))

    def test_distribution_without_a_package_is_not_supported(self):
        self.packages = {"vmwatch-agent.rpm": "0" * 64}
        self.fails("this distribution is not supported")
        self.packages = {}
        self.fails("this distribution is not supported")
        (self.bin / "apt-get").unlink()
        self.fails("it has neither apt nor rpm")
        self.assertEqual(self.calls(), [])

    def test_failed_installation_is_removed(self):
        (self.folder / "broken-package").touch()
        self.fails("no space left")
        self.assertEqual(self.names(), ["apt-get -o", "dpkg --purge"])

    def test_failed_enrolment_removes_the_package_that_was_installed(self):
        (self.folder / "refused").touch()
        said = self.fails("token: this VM could not be enrolled")
        self.assertIn("the join token is expired", said)
        self.assertEqual(self.names(), ["apt-get -o", "vmwatch-agent enroll", "dpkg --purge"])

    def test_failed_enrolment_keeps_what_was_there_before(self):
        (self.folder / "refused").touch()
        (self.folder / "etc").mkdir()
        self.fails("could not be enrolled")
        self.assertEqual(self.names()[-1], "dpkg --remove", "settings of an earlier installation are kept")
        (self.folder / "calls").unlink()
        self.fails("could not be enrolled")
        self.assertEqual(self.names(), ["apt-get -o", "vmwatch-agent enroll"], "the package was there before")

    def test_enrolled_vm_is_upgraded_without_a_token(self):
        self.be_enrolled()
        said = self.succeeds(token=None)
        self.assertEqual(self.names(), ["apt-get -o", "systemctl restart"])
        self.assertIn("this VM is enrolled; its identity is kept", said)

    def test_agent_that_does_not_report_stays_installed_and_its_reason_is_shown(self):
        self.server.ready = (503, b"no connection to NATS")
        said = self.fails("vmwatch has not acknowledged a sample in 3 s: no connection to NATS")
        self.assertIn("the last line of the log", said)
        self.server.ready = (200, b"")
        for metrics in (PUBLISHED, b""):
            self.server.metrics = metrics
            self.fails("none of its samples was acknowledged yet", token=None)
        (self.folder / "broken-unit").touch()
        self.fails("the agent does not start")
        self.assertNotIn("dpkg", " ".join(self.names()))

    def test_health_endpoint_of_the_settings_is_asked(self):
        (self.folder / "etc").mkdir()
        with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
            port = taken.getsockname()[1]
        (self.folder / "etc/agent.env").write_text(f"VMWATCH_HEALTH_LISTEN=127.0.0.1:{port}\n")
        self.fails(f"port {port}")

    def test_wrong_clock_is_reported(self):
        for ahead, text in [(3600, "s behind; synchronize it with NTP"), (-3600, "s ahead; synchronize it with NTP")]:
            self.server.ahead = ahead
            self.assertRegex(self.succeeds(), f"warning: the clock of this VM is 3[56][0-9][0-9] {text}")
        self.server.ahead = 0
        self.assertNotIn("clock", self.succeeds())

    def test_cause_of_a_failed_download_is_reported(self):
        (self.served / "vmwatch-agent.deb").unlink()
        self.assertIn("404", self.fails("refused the download"))
        self.url = f"https://{self.address}"
        self.fails("TLS: this VM does not accept the certificate")
        self.url = "https://vmwatch.invalid"
        self.fails("DNS: this VM cannot resolve the name in https://vmwatch.invalid")
        with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as closed:
            self.url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        self.fails("port: ")
        self.assertEqual(self.calls(), [])

    @unittest.skipUnless(shutil.which("wget"), "wget is not installed")
    def test_wget_is_used_without_curl(self):
        self.make_programs(["wget"])
        self.server.ahead = 3600
        self.assertIn("behind; synchronize it with NTP", self.succeeds())
        self.server.ready = (503, b"no connection to NATS")
        self.fails("no connection to NATS")
        (self.served / "vmwatch-agent.deb").unlink()
        self.assertIn("404", self.fails("refused the download"))

    def test_rpm_is_used_without_apt(self):
        self.packages = {"vmwatch-agent.rpm": self.serve("vmwatch-agent.rpm", b"rpm")}
        (self.bin / "apt-get").unlink()
        (self.bin / "uname").symlink_to(shutil.which("uname"))
        rpm = self.bin / "rpm"
        rpm.write_text(f'#!/bin/sh\necho "rpm $*" >> {self.folder}/calls\n[ "$1" != --query ]\n')
        rpm.chmod(0o755)
        self.succeeds()
        self.assertIn("rpm --upgrade --replacepkgs --oldpackage vmwatch-agent.rpm", self.calls())

    def test_arguments_are_checked(self):
        self.assertIn("--token-file FILE", self.succeeds("--help", token=None))
        self.fails("unknown option --token=x", "--token=x")
        self.fails("--token needs a value", "--token")
        (self.bin / "id").write_text("#!/bin/sh\necho 1000\n")
        self.fails("root is needed: run this with sudo")
        self.assertEqual(self.calls(), [])


if __name__ == "__main__":
    unittest.main()
