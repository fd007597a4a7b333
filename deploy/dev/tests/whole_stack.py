"""Tests `./dev` with the real programs, in a folder of its own, so a running stack is not affected.

The file is not named test_*.py, because unit tests run before the binaries are built. `./dev test` runs it afterwards.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import unittest
import urllib.request
from pathlib import Path

from dev import bus, layout, machines, ports
from dev.processes import Identity, wait_for

# Time limit in seconds for a condition; it is much longer than a stack needs on an idle machine.
PATIENCE = 120


class WholeStack(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="vmwatch-dev-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        # Settings of the environment are removed, so the stack under test gets only the settings below.
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("VMWATCH_")}
        self.env.update(VMWATCH_DEV_DIR=str(self.folder), VMWATCH_LISTEN=f"127.0.0.1:{self.port}")
        if "VMWATCH_CACHE" in os.environ:
            self.env["VMWATCH_CACHE"] = os.environ["VMWATCH_CACHE"]
        self.addCleanup(self.dev, "down")

    def dev(self, *arguments):
        return subprocess.run(
            [layout.ROOT / "dev", *arguments], env=self.env, timeout=PATIENCE,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )

    def detach(self):
        shown = self.dev("up", "--detach")
        self.assertEqual(shown.returncode, 0, shown.stdout)
        return shown.stdout

    def status(self):
        return json.loads(self.dev("status", "--json").stdout)

    def identities(self):
        """Returns the stack's processes, after checking that there is one of each program."""
        found = {service["name"]: Identity.of(service["pid"]) for service in self.status()["services"]}
        self.assertEqual(set(found), {"nats", "database", "auth", "metrics", "lifecycle", "alert", "gateway", "agent"})
        self.assertNotIn(None, found.values())
        return found

    def left_over(self):
        """Returns all processes that have this stack's folder in their environment, even if ./dev has not recorded them."""
        mark, found = f"VMWATCH_DEV_DIR={self.folder}\0".encode(), []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (path / "environ").read_bytes() and Identity.of(int(path.name)):
                    found.append((path / "cmdline").read_bytes())
        return found

    @contextlib.contextmanager
    def foreground(self):
        """Runs `./dev up` with its output in a file. Kills it at the end of the test if it is still running."""
        out = self.folder / "out.txt"
        with open(out, "w") as file:
            process = subprocess.Popen(
                # The test runs `./dev up` like a background job of a script, in which SIGINT is ignored.
                ["sh", "-c", "trap '' INT; exec \"$0\" up", layout.ROOT / "dev"],
                env=self.env, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            )
        try:
            self.await_text(out, "Ctrl-C stops the stack")
            yield process, out
        finally:
            process.kill()
            process.wait()

    def await_text(self, path, text):
        self.assertTrue(wait_for(lambda: text in path.read_text(), PATIENCE), path.read_text())


class Detached(WholeStack):
    def test_stack_works_from_up_to_down(self):
        shown = self.detach()
        started = self.identities()
        self.check_pasted_lines(shown)
        self.check_status()
        self.check_nats_refuses_unknown_clients()
        self.check_second_stack_is_refused()
        self.check_logs()
        self.check_status_of_an_ended_service(started["metrics"])
        self.assertEqual(self.dev("down").returncode, 0)
        self.assertEqual(self.left_over(), [])
        self.assertIn("Nothing is running", self.dev("status").stdout)

    def check_pasted_lines(self, shown):
        lines = re.findall(r"(?m)^  ((?:session=|curl |VMWATCH_NATS_URL=).*)$", shown)
        self.assertEqual(len(lines), 5, shown)
        pasted = subprocess.run(
            ["bash", "-e"], input="\n".join(lines) + "\n", env={"PATH": os.environ["PATH"]},
            stdout=subprocess.PIPE, text=True, check=True, timeout=PATIENCE,
        ).stdout.splitlines()
        vm, processes, start = map(json.loads, pasted[:3])
        instance = self.status()["instance_id"]
        self.assertEqual([answer["status_code"] for answer in (vm, processes, start)], [1, 1, 1], pasted)
        self.assertEqual((len(vm["data"]), len(processes["data"])), (1, 4))
        for row in vm["data"] + processes["data"]:
            self.assertIn(f"u'instance_id': u'{instance}'", row)
        self.assertRegex(pasted[3], rf"{machines.TO_START}\s+running")
        self.check_command_line(shown, instance)

    def check_command_line(self, shown, instance):
        login, = re.findall(r"(?m)^  (export VMWATCH_CONFIG=.*)$", shown)
        top, = re.findall(r"(?m)^  (\S+/vmwatch top .*)$", shown)
        # `top` needs a terminal.
        listing = top.replace(f"top {instance}", f"ps {instance}")
        pasted = subprocess.run(
            ["bash", "-e"], input=f"{login}\n{listing}\n", env={"PATH": os.environ["PATH"]},
            stdout=subprocess.PIPE, text=True, check=True, timeout=PATIENCE,
        ).stdout
        self.assertRegex(pasted, r"(?m)^ *PID  ")
        self.assertGreater(len(pasted.splitlines()), 1)

    def check_status(self):
        status = self.status()
        self.assertEqual({service["state"] for service in status["services"]}, {"ready"})
        password = Path(status["admin_password_file"])
        self.assertEqual(password.stat().st_mode & 0o777, 0o600)
        data = {"user_name": status["admin_user"], "password": password.read_text().strip()}
        login = {"method": 458753, "data": data}
        with urllib.request.urlopen(status["api"], json.dumps(login).encode(), timeout=10) as answer:
            self.assertEqual(json.load(answer)["status_code"], 1)
        shown = self.dev("status")
        self.assertEqual(shown.returncode, 0, shown.stdout)
        self.assertIn(status["api"], shown.stdout)

    def check_nats_refuses_unknown_clients(self):
        host, port = ports.parse_address(self.status()["nats"].removeprefix("nats://"))
        for login in (b'{"verbose":false}', b'{"verbose":false,"user":"guess","pass":"guess"}'):
            with socket.create_connection((host, port), timeout=PATIENCE) as client:
                client.sendall(b"CONNECT " + login + b"\r\nPING\r\n")
                said = client.makefile("rb").read()
            self.assertIn(b"Authorization Violation", said)
            self.assertNotIn(b"PONG", said)

    def check_second_stack_is_refused(self):
        refused = self.dev("up")
        self.assertEqual(refused.returncode, 1)
        self.assertIn("./dev status", refused.stdout)
        self.assertEqual({service["state"] for service in self.status()["services"]}, {"ready"})

    def check_logs(self):
        self.assertIn("nats", self.dev("logs").stdout)
        self.assertIn("Server is ready", self.dev("logs", "nats").stdout)
        self.assertEqual(self.dev("logs", "nonsense").returncode, 64)

    def check_status_of_an_ended_service(self, process):
        process.send(signal.SIGKILL)
        self.assertTrue(process.wait(PATIENCE))
        shown = self.dev("status")
        self.assertEqual(shown.returncode, 1)
        self.assertRegex(shown.stdout, r"metrics +\d+ +ended")


    def test_stack_keeps_what_was_stored_before_nats_had_accounts(self):
        self.detach()
        password = Path(self.status()["admin_password_file"]).read_text().strip()
        session = self.ask({"method": 458753, "data": {"user_name": "admin", "password": password}})["session_id"]
        self.assertEqual(self.dev("down").returncode, 0)
        accounts = self.folder / "nats" / "jetstream"
        (accounts / bus.ACCOUNT).rename(accounts / bus.FORMER_ACCOUNT)
        for made in ("secrets", "nats-config", "agent-identity"):
            shutil.rmtree(self.folder / made)
        self.detach()
        rows = self.ask({"method": 611611, "data": {"instance_id": self.status()["instance_id"]}, "session_id": session, "limit": 1})
        self.assertEqual(rows["status_code"], 1, rows)

    def ask(self, request):
        body = json.dumps(request).encode()
        with urllib.request.urlopen(self.status()["api"], body, timeout=10) as answer:
            return json.load(answer)


class Foreground(WholeStack):
    def test_ctrl_c_stops_the_stack_and_next_up_keeps_data_and_ports(self):
        with self.foreground() as (process, out):
            started = self.identities()
            before = self.status()
            started["lifecycle"].send(signal.SIGKILL)
            self.await_text(out, "lifecycle has ended (signal SIGKILL)")
            process.send_signal(signal.SIGINT)
            self.assertEqual(process.wait(PATIENCE), 1, "`up` must exit with 1 because a program was killed: " + out.read_text())
        self.assertEqual(self.left_over(), [])
        with self.foreground() as (process, out):
            # `up` prints a warning if the administrator cannot log in with the initial password.
            self.assertNotIn("cannot log in", out.read_text())
            after = self.status()
            self.assertEqual((before["nats"], before["instance_id"]), (after["nats"], after["instance_id"]))
            down = self.dev("down")
            self.assertEqual(down.returncode, 0, down.stdout)
            self.assertEqual(process.wait(PATIENCE), 0, out.read_text())
        self.assertEqual(self.left_over(), [])

    def test_up_stops_programs_that_a_killed_up_left_running(self):
        with self.foreground() as (process, _):
            left = self.identities()
            process.kill()
            process.wait()
            self.assertTrue(all(one.alive() for one in left.values()))
        shown = self.detach()
        self.assertIn("was killed and left programs running", shown)
        self.assertEqual([name for name, one in left.items() if one.alive()], [])

    def test_interrupted_up_leaves_no_processes(self):
        for programs in (0, 1, 2, 4, 7):
            with self.subTest(started=programs):
                process = subprocess.Popen(
                    [layout.ROOT / "dev", "up"], env=self.env, stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                )
                self.addCleanup(process.kill)
                self.assertTrue(wait_for(lambda: self.recorded(process.pid) >= programs, PATIENCE))
                process.send_signal(signal.SIGTERM)
                self.assertEqual(process.wait(PATIENCE), 130)
                self.assertEqual(self.left_over(), [])

    def recorded(self, guard):
        """Returns how many programs this ./dev has recorded; -1 if it has recorded nothing yet."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            state = json.loads((self.folder / "state.json").read_text())
            if state["guard"]["pid"] == guard:
                return len(state["programs"])
        return -1


class Ports(WholeStack):
    def test_port_in_use_is_reported_with_its_setting_before_anything_starts(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", self.port))
            taken.listen()
            refused = self.dev("up")
        self.assertEqual(refused.returncode, 1)
        self.assertIn(f"port {self.port} is in use; set VMWATCH_LISTEN=127.0.0.1:PORT", refused.stdout)
        suggested = int(re.search(r"VMWATCH_LISTEN=127\.0\.0\.1:(\d+) ", refused.stdout)[1])
        self.assertTrue(ports.is_free(suggested))


if __name__ == "__main__":
    unittest.main()
