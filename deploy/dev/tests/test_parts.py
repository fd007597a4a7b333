"""Tests of small modules of ./dev that have no test file of their own."""

import contextlib
import ctypes
import io
import json
import os
import re
import signal
import subprocess
import tempfile
import time
import unittest
from dataclasses import replace
from pathlib import Path
from unittest import mock

from dev import bus, cargo, commands, figures, guide, interrupts, layout, machines, stack, state, terminal, tools
from dev.processes import Identity
from dev.state import Running, State


def libvirt_state(node_file: Path, identity: str) -> int:
    """Returns the state of a VM that libvirt's test driver reports for the given definitions."""
    library = ctypes.CDLL("libvirt.so.0")
    library.virConnectOpen.restype = library.virDomainLookupByUUIDString.restype = ctypes.c_void_p
    connection = ctypes.c_void_p(library.virConnectOpen(f"test://{node_file}".encode()))
    domain = ctypes.c_void_p(library.virDomainLookupByUUIDString(connection, identity.encode()))
    state = ctypes.c_int(-1)
    library.virDomainGetState(domain, ctypes.byref(state), None, 0)
    return state.value


class Terminal(unittest.TestCase):
    def test_table_columns_are_aligned(self):
        self.assertEqual(terminal.table([("a", "bb"), ("ccc", "d")]), "a    bb\nccc  d")

    def test_no_color_variable_disables_colours(self):
        screen = mock.Mock(isatty=lambda: True)
        for environ, expected in (({"TERM": "xterm"}, True), ({"TERM": "dumb"}, False), ({"NO_COLOR": "1"}, False)):
            with mock.patch.dict(os.environ, environ, clear=True):
                self.assertEqual(terminal.coloured(screen), expected, environ)
        self.assertFalse(terminal.coloured(io.StringIO()))

    def test_durations_are_formatted_in_minutes_and_seconds(self):
        self.assertEqual(terminal.seconds(1.25), "1.2 s")
        self.assertEqual(terminal.seconds(605), "10 min 05 s")


class Versions(unittest.TestCase):
    def test_nats_version_is_parsed(self):
        self.assertEqual(tools.nats_version("nats-server: v2.15.1"), (2, 15))
        self.assertLess(tools.nats_version("nats-server version 2.9.10"), tools.NATS_LEAST)
        self.assertEqual(tools.nats_version("something else"), (0, 0))

    def test_progress_is_extracted_from_cargo_output(self):
        bar = "Building [=====>     ] 123/456: tokio, serde(build)"
        self.assertEqual(cargo.progress(bar), "123/456 tokio")
        self.assertEqual(cargo.progress("Compiling ring v0.17.14"), "Compiling ring v0.17.14")
        self.assertEqual(cargo.progress("warning: something"), "")


class Figures(unittest.TestCase):
    def test_option_with_value_is_removed_from_arguments(self):
        self.assertEqual(figures.option(["a", "--json", "f", "b"], "--json"), ("f", ["a", "b"]))
        self.assertEqual(figures.option(["--json=f"], "--json"), ("f", []))
        self.assertEqual(figures.option(["a"], "--json"), (None, ["a"]))
        for invalid in (["--json"], ["--json="]):
            with self.assertRaises(terminal.Problem):
                figures.option(invalid, "--json")

    def test_measured_figures_are_printed_and_written_to_file(self):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as screen:
            target = Path(folder) / "figures.json"
            with figures.Figures(target) as measured:
                with mock.patch.dict(os.environ, measured.environment()):
                    for name, value in (("b_ms", 2.5), ("a", 1), ("b_ms", 3.5)):
                        figures.record(name, value)
            self.assertEqual(json.loads(target.read_text()), {"figures": {"a": 1, "b_ms": 3.5}})
            self.assertIn("b_ms  3.5", screen.getvalue())
        with self.assertRaises(terminal.Problem):
            figures.Figures("/no/such/folder/figures.json")


class Machines(unittest.TestCase):
    def test_uuids_are_written_in_the_format_of_libvirt(self):
        self.assertEqual(machines.as_uuid(" 6ABF5A1E-B85C-4E5F-BA02-F96E22CBD02E\n"), machines.TO_START)
        self.assertEqual(machines.as_uuid("my-vm"), "")

    def test_libvirt_test_driver_reports_the_defined_vm_states(self):
        this = "11111111-2222-4333-8444-555555555555"
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(machines.layout, "DOT", Path(folder)):
            path = machines.write_node_file(this)
            self.assertEqual(libvirt_state(path, this), machines.RUNNING)
            for _name, identity, expected in machines.OTHERS:
                self.assertEqual(libvirt_state(path, identity), expected)

    def test_machine_is_not_defined_as_vm_if_its_id_is_not_a_uuid(self):
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(machines.layout, "DOT", Path(folder)):
            self.assertEqual(machines.write_node_file("my-vm").read_text().count("<domain "), len(machines.OTHERS))

    def test_generated_instance_id_stays_the_same(self):
        with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"VMWATCH_INSTANCE_ID": ""}):
            with mock.patch.object(machines.layout, "DOT", Path(folder)), \
                    mock.patch.object(machines, "DMI", Path(folder) / "none"):
                self.assertEqual(machines.instance_id(), machines.instance_id())

    def test_sampling_intervals_set_by_the_user_are_kept(self):
        self.assertEqual(stack.agent_intervals({"VMWATCH_AGENT_VM_INTERVAL": "5s"}), {})
        self.assertEqual(len(stack.agent_intervals({})), 2)


class Bus(unittest.TestCase):
    def test_configuration_of_nats_is_the_deployed_one_without_open_ports_and_tls(self):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            (root / "made").mkdir()
            for name in ("users.conf", "system.conf", "callout.conf"):
                (root / "made" / name).write_text("")
            path = bus.write_config(layout.ROOT / "deploy/nats", root / "made", root / "config", root / "store")
            text = path.read_text()
            for part in ("auth_callout", "include accounts.conf", "sync_interval: always", f'store_dir: "{root}/store"'):
                self.assertIn(part, text)
            for part in ("0.0.0.0", "8222", "tls.conf", "websocket.conf"):
                self.assertNotIn(part, text)
            included = re.findall(r"(?m)^\s*include (\S+)$", text + (path.parent / "accounts.conf").read_text())
            self.assertEqual([name for name in included if not (path.parent / name).exists()], [])

    def test_data_of_a_server_without_accounts_moves_once_to_the_account_of_the_services(self):
        with tempfile.TemporaryDirectory() as folder:
            store = Path(folder)
            bus.keep_data(store)
            former, now = (store / "jetstream" / name for name in ("$G", "VMWATCH"))
            (former / "streams").mkdir(parents=True)
            bus.keep_data(store)
            self.assertTrue((now / "streams").exists() and not former.exists())
            former.mkdir()
            bus.keep_data(store)
            self.assertTrue(former.exists(), "data of the account must not be overwritten")


class Kept(unittest.TestCase):
    def test_stack_state_round_trips_through_its_file(self):
        identity = Identity(4711, 99, "boot")
        kept = State(
            ports={"nats": 28001}, guard=identity, gateway="http://127.0.0.1:8086",
            programs=[Running("nats", identity, "127.0.0.1:28001", "", "/log")],
        )
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(state.layout, "DOT", Path(folder)), \
                mock.patch.object(state, "FILE", Path(folder) / "state.json"):
            self.assertEqual(state.load(), State())
            kept.save()
            self.assertEqual(state.load(), kept)
            state.FILE.write_text("{")
            self.assertEqual(state.load(), State())

    def test_passwords_are_removed_from_uris(self):
        self.assertEqual(state.redacted("mongodb://me:pass@db:27017/x"), "mongodb://db:27017/x")
        self.assertEqual(state.redacted("nats://a:b@one:1,nats://c@two:2"), "nats://one:1,nats://two:2")
        self.assertEqual(state.redacted("mongodb://db:27017"), "mongodb://db:27017")

    def test_initial_password_is_generated_once_and_readable_only_by_owner(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "password"
            with mock.patch.multiple(stack.layout, PASSWORD=path, DOT=Path(folder)):
                made = stack.first_password()
                self.assertEqual(stack.first_password(), made)
            self.assertEqual(path.stat().st_mode & 0o777, 0o600)
            self.assertEqual(len(made), 20)


class Plans(unittest.TestCase):
    PORTS = {name: 28001 + index for index, name in enumerate(("nats", "auth", "metrics", "lifecycle", "alert", "gateway", "agent"))}

    def setUp(self):
        # Without these settings, a plan writes the definitions of simulated VMs and makes a folder for packages.
        kept = {"VMWATCH_HYPERVISORS": "lab=qemu:///system", "VMWATCH_PUBLIC_URL": "https://vmwatch.example.com"}
        patched = mock.patch.dict(os.environ, kept)
        patched.start()
        self.addCleanup(patched.stop)

    def plan(self, nats_server):
        current = State(ports=self.PORTS, gateway="http://127.0.0.1:8086", nats="nats://127.0.0.1:28001")
        return stack.Plan(Path("/built"), nats_server, None, "127.0.0.1:8086", current)

    def test_alert_svc_starts_with_its_key_and_never_sends_to_health_listeners(self):
        alert = next(one for one in self.plan(Path("/nats-server")).services() if one.name == "alert")
        self.assertEqual(alert.env["VMWATCH_ALERT_KEY_FILE"], str(bus.alert_key()))
        self.assertEqual(alert.env["VMWATCH_NATS_USER"], "vmwatch-alert")
        for name in ("auth", "metrics", "lifecycle", "gateway", "agent"):
            self.assertIn(f"127.0.0.1:{self.PORTS[name]}", alert.env["VMWATCH_ALERT_INTERNAL"].split(","))

    def test_every_service_is_stopped(self):
        plan = self.plan(Path("/nats-server"))
        stopped = {name for group in stack.STOP_ORDER for name in group}
        self.assertLessEqual({program.name for program in plan.services()}, stopped)

    def test_streams_of_metrics_svc_are_set_up_before_alert_svc(self):
        setups = [program.name for program in self.plan(Path("/nats-server")).setups()]
        self.assertLess(setups.index("metrics-setup"), setups.index("alert-setup"))
        self.assertEqual(self.plan(None).setups(), [])


class Guide(unittest.TestCase):
    def test_printed_commands_work_in_a_shell(self):
        current = State(gateway="http://127.0.0.1:8086", nats="nats://127.0.0.1:28001", admin="admin", instance="vm-1")
        lines = [line for _, line in guide.session_lines(current, "pa'ss", Path("/with space"))]
        # The test replaces curl with a function that prints its last argument.
        fake = """curl() { for last; do :; done; printf '%s' "$last"; }\n"""
        script = fake + "\n".join(lines[:2]) + """\nprintf '%s' "$session" """
        answer = '{"method":458753,"session_id":"THE-TOKEN"}'
        login = fake.replace('"$last"', f"'{answer}'") + lines[0] + "\n"
        shown = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
        self.assertIn('"data":{"instance_id":"vm-1"},"session_id":"","limit":1}', shown)
        session = subprocess.run(["sh", "-c", f'{login}echo "$session"'], capture_output=True, text=True, check=True)
        self.assertEqual(session.stdout, "THE-TOKEN\n")
        self.assertRegex(
            lines[6],
            r"^VMWATCH_NATS_URL=nats://127.0.0.1:28001 VMWATCH_NATS_USER=vmwatch-operator VMWATCH_NATS_PASSWORD_FILE=\S+ "
            "'/with space/vmwatch-lifecycle' state",
        )
        self.assertRegex(
            lines[3],
            "^export VMWATCH_CONFIG=[^;]+/vmwatch.toml; '/with space/vmwatch' login http://127.0.0.1:8086 --user admin "
            r"--password-file \S+/admin-password$",
        )
        self.assertEqual(lines[4], "'/with space/vmwatch' top vm-1")
        # The command line refuses a gateway without TLS on another machine.
        remote = guide.session_lines(replace(current, gateway="http://192.0.2.1:8086"), "pass", Path("/bin"))
        self.assertFalse([line for _, line in remote if "/bin/vmwatch login" in line])


class Interrupts(unittest.TestCase):
    def test_deferred_signal_is_raised_after_the_block(self):
        kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        self.addCleanup(lambda: [signal.signal(number, handler) for number, handler in kept.items()])
        interrupts.install()
        reached = False
        with self.assertRaises(KeyboardInterrupt):
            with interrupts.held_back():
                os.kill(os.getpid(), signal.SIGTERM)
                self.assertTrue(interrupts.pending())
                reached = True
        self.assertTrue(reached)
        with self.assertRaises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)


class Commands(unittest.TestCase):
    def run_main(self, *arguments):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = commands.main(list(arguments))
        return code, out.getvalue(), err.getvalue()

    def test_help_lists_every_command(self):
        for arguments in ((), ("help",), ("-h",), ("up", "--help")):
            code, out, _ = self.run_main(*arguments)
            self.assertEqual(code, 0)
            for command in commands.COMMANDS:
                self.assertIn(command.usage, out)

    def test_invalid_arguments_are_usage_errors(self):
        for arguments in (("fly",), ("up", "--fast"), ("status", "--xml"), ("down", "now"), ("install", "x")):
            code, _, err = self.run_main(*arguments)
            self.assertEqual(code, terminal.EX_USAGE, arguments)
            self.assertTrue(err.startswith("dev: "), err)


if __name__ == "__main__":
    unittest.main()
