import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from dev import processes
from dev.processes import Identity
from dev.terminal import Problem, Step


def sleeper():
    return subprocess.Popen([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"],
                            stdout=subprocess.PIPE)


class Stat(unittest.TestCase):
    def test_process_name_with_spaces_and_parentheses_is_parsed(self):
        text = "4711 (a) b (c) S 1 4711 4711 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 123 456\n"
        self.assertEqual(processes.parse_stat(text), ("S", 987654))


class Identities(unittest.TestCase):
    def setUp(self):
        self.child = sleeper()
        self.addCleanup(self.child.stdout.close)
        self.addCleanup(self.child.wait)
        self.addCleanup(self.child.kill)
        self.identity = Identity.of(self.child.pid)

    def test_zombie_process_does_not_count_as_alive(self):
        self.assertTrue(self.identity.alive())
        self.child.kill()
        # The test has not called wait() yet, so the child process is a zombie now.
        self.assertTrue(self.identity.wait(10))
        self.assertIsNone(Identity.of(self.child.pid))

    def test_other_process_with_same_pid_is_not_signalled(self):
        for other in (
            dataclasses.replace(self.identity, start=self.identity.start - 1),
            dataclasses.replace(self.identity, boot="another boot"),
        ):
            self.assertFalse(other.alive())
            other.send(signal.SIGKILL)
        # Signals are delivered immediately. If the calls above had sent SIGKILL, the process would no longer be alive.
        self.assertTrue(self.identity.alive())
        self.identity.send(signal.SIGTERM)
        self.assertEqual(self.child.wait(10), -signal.SIGTERM)

    def test_signalling_an_ended_process_does_nothing(self):
        self.child.kill()
        self.child.wait()
        self.identity.send(signal.SIGTERM)


class Run(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.log = Path(folder.name) / "logs" / "it.log"

    def test_command_progress_is_reported_and_only_final_progress_bar_is_logged(self):
        reported = []
        script = (
            r"import sys; sys.stdout.write('one\rtwo\r\x1b[Kthree\n'); sys.stdout.flush(); sys.stderr.write('four')"
        )
        processes.run(Step("it"), [sys.executable, "-c", script], self.log, lambda line: reported.append(line))
        self.assertEqual([line for line in reported if line], ["one", "two", "three", "four"])
        self.assertEqual(self.log.read_text(), "three\nfour\n")

    def test_failed_command_shows_its_last_output_and_the_log_path(self):
        script = "import sys; print('the reason'); sys.exit(3)"
        with self.assertRaises(Problem) as raised:
            processes.run(Step("it"), [sys.executable, "-c", script], self.log)
        self.assertIn("exit code 3", str(raised.exception))
        self.assertIn("the reason", raised.exception.todo)
        self.assertIn(str(self.log), raised.exception.todo)

    def test_command_that_exceeds_its_time_limit_is_killed(self):
        script = "import signal, time; signal.signal(15, signal.SIG_IGN); print('working', flush=True); time.sleep(600)"
        with self.assertRaises(Problem) as raised:
            processes.run(Step("it"), [sys.executable, "-c", script], self.log, limit=1.0)
        self.assertIn("timed out after 1 s", str(raised.exception))
        self.assertIn("working", raised.exception.todo)

    def test_spawned_program_has_its_own_session_and_keeps_its_previous_log(self):
        for line in ("first", "second"):
            script = f"import os; print({line!r}, os.getsid(0))"
            child = processes.spawn([sys.executable, "-c", script], dict(os.environ), self.log)
            child.wait()
        self.assertEqual(self.log.read_text().split(), ["second", str(child.pid)])
        self.assertIn("first", self.log.with_suffix(".log.1").read_text())

    def test_last_lines_of_a_log_are_returned(self):
        self.log.parent.mkdir()
        self.log.write_text("".join(f"{number}\n" for number in range(100_000)))
        self.assertEqual(processes.tail(self.log, 2), "99998\n99999")
        self.assertEqual(processes.tail(self.log.with_name("none"), 2), "")


if __name__ == "__main__":
    unittest.main()
