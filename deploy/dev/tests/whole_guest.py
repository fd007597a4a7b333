"""Tests `./dev up --guest` and the commands that it prints, and checks that no process is left behind."""

import json
import os
import re
import signal
import subprocess
import unittest
import urllib.request
from pathlib import Path

from dev.processes import Identity, wait_for
from dev.tests.whole_stack import PATIENCE, WholeStack


class Guest(WholeStack):
    def up(self, *options):
        shown = self.dev("up", "--detach", "--guest", *options)
        self.assertEqual(shown.returncode, 0, shown.stdout)
        return shown.stdout

    def guest(self):
        return self.status()["guest"]

    def process(self, service):
        return Identity.of(next(one["pid"] for one in self.status()["services"] if one["name"] == service))

    def paste(self, lines):
        pasted = subprocess.run(
            ["bash", "-e"], input="\n".join(lines) + "\n", env={"PATH": os.environ["PATH"]},
            stdout=subprocess.PIPE, text=True, check=True, timeout=PATIENCE,
        )
        return pasted.stdout

    def test_guest_starts_and_reports_and_ends_with_the_stack(self):
        lines = re.findall(r"(?m)^  ((?:session=|posted=|virsh |until |curl .*proc_name|cat ).*)$", self.up())
        self.assertEqual(len(lines), 6, lines)
        off = self.guest()
        self.assertIsNone(off["pid"])
        libvirtd = self.process("libvirtd")

        output = self.paste(lines)
        self.assertEqual(json.loads(output.splitlines()[0])["status_code"], 1, output)
        self.assertIn("running", output.splitlines())
        self.assertRegex(output, r"first row after \d+ ms")
        rows = [row for line in output.splitlines() if line.startswith("{") for row in json.loads(line)["data"] or []]
        self.assertEqual(len(rows), 2, output)
        for row in rows:
            self.assertIn(f"u'instance_id': u'{off['instance_id']}'", row)
        self.assertIn("u'cmd': u'vmwatch-agent'", rows[1])
        self.assertIn("vmwatch guest is up", output)
        qemu = Identity.of(self.guest()["pid"])
        self.assertIn(f"on, QEMU has pid {qemu.pid}", self.dev("status").stdout)

        self.assertEqual(self.dev("down").returncode, 0)
        self.assertFalse(libvirtd.alive() or qemu.alive())
        self.assertFalse(self.folder_of(off).exists())
        self.assertEqual(self.left_over(), [])

    def test_down_stops_guest_after_libvirtd_crash_and_next_guest_is_new_vm(self):
        self.paste(re.findall(r"(?m)^  ((?:session=|posted=).*)$", self.up()))
        first, qemu = self.guest(), Identity.of(self.guest()["pid"])
        for service in self.status()["services"]:
            Identity.of(service["pid"]).send(signal.SIGKILL)
        self.assertTrue(qemu.alive(), "the guest must keep running when libvirtd is killed")
        self.assertEqual(self.dev("down").returncode, 0)
        self.assertFalse(qemu.alive())
        self.assertFalse(self.folder_of(first).exists())
        self.up()
        # The new VM must have a different id, so it has no rows of the first VM.
        self.assertNotEqual(self.guest()["instance_id"], first["instance_id"])

    def test_guest_without_agent_has_a_chart_from_libvirt(self):
        lines = re.findall(r"(?m)^  ((?:session=|posted=|virsh |until |cat ).*)$", self.up("--no-agent"))
        self.assertEqual(len(lines), 5, lines)
        output = self.paste(lines)
        self.assertIn("running", output.splitlines())
        self.assertRegex(output, r"first row after \d+ ms")

        guest, token = self.guest(), self.token()
        series = f"/vms/{guest['instance_id']}/samples"
        used = lambda: [bucket["cpu_util"] for bucket in self.rest(f"{series}?source=hypervisor", token)["buckets"]]
        self.assertTrue(wait_for(lambda: any(used()), PATIENCE), used())
        console = Path(guest["console"])
        self.assertTrue(wait_for(lambda: "vmwatch guest is up" in console.read_text(), PATIENCE), console.read_text())
        self.assertEqual(self.rest(series, token)["buckets"], [])
        self.assertEqual(console.read_text().partition("vmwatch guest is up")[2].strip(), "", "an agent must not run")

    def test_option_without_agent_is_refused_without_a_guest(self):
        refused = self.dev("up", "--detach", "--no-agent")
        self.assertEqual((refused.returncode, self.left_over()), (64, []), refused.stdout)
        self.assertIn("--guest", refused.stdout)

    def token(self):
        """Logs in as administrator. Returns the session's token."""
        login = {"user_name": "admin", "password": Path(self.status()["admin_password_file"]).read_text().strip()}
        return self.rest("/sessions", "", login)["token"]

    def rest(self, path, token, body=None):
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/api/v1{path}", body and json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        if token:
            request.add_header("Authorization", f"Bearer {token}")
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return json.load(answer)

    def folder_of(self, guest):
        return Path(guest["console"]).parents[1]


if __name__ == "__main__":
    unittest.main()
