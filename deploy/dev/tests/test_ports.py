import socket
import unittest

from dev import ports
from dev.terminal import Problem


class Choose(unittest.TestCase):
    def test_remembered_ports_are_kept_while_they_are_free(self):
        chosen = ports.choose(["nats", "auth"], {"nats": 28111, "auth": 28112}, "here", lambda port: port != 28112)
        self.assertEqual(chosen["nats"], 28111)
        self.assertNotEqual(chosen["auth"], 28112)

    def test_no_port_is_given_twice_and_all_are_in_the_range(self):
        names = [str(number) for number in range(50)]
        chosen = ports.choose(names, {"0": 28000, "1": 28000}, "here", lambda port: port % 2 == 0)
        self.assertEqual(len(set(chosen.values())), len(names))
        for port in chosen.values():
            self.assertEqual(port % 2, 0)
            self.assertTrue(ports.FIRST <= port < ports.FIRST + ports.COUNT)

    def test_checkouts_begin_at_different_places_and_always_at_the_same(self):
        def first(seed):
            return ports.choose(["nats"], {}, seed, lambda port: True)["nats"]

        self.assertEqual(first("/home/a"), first("/home/a"))
        self.assertNotEqual(first("/home/a"), first("/home/b"))

    def test_when_nothing_is_free_it_says_so(self):
        with self.assertRaises(Problem):
            ports.choose(["nats"], {}, "here", lambda port: False)


class Probes(unittest.TestCase):
    def test_a_port_that_somebody_listens_on_is_not_free(self):
        for host in ("127.0.0.1", "0.0.0.0"):
            with socket.socket() as server:
                server.bind((host, 0))
                server.listen()
                port = server.getsockname()[1]
                self.assertFalse(ports.is_free(port), host)
                self.assertTrue(ports.answers(port))
            self.assertTrue(ports.is_free(port), host)
            self.assertFalse(ports.answers(port))


class Addresses(unittest.TestCase):
    def test_addresses_are_read_and_shown_as_reached(self):
        self.assertEqual(ports.parse_address("127.0.0.1:8086"), ("127.0.0.1", 8086))
        self.assertEqual(ports.parse_address("[::1]:8086"), ("::1", 8086))
        self.assertEqual(ports.reachable("0.0.0.0"), "127.0.0.1")
        self.assertEqual(ports.reachable("::"), "[::1]")
        self.assertEqual(ports.reachable("::1"), "[::1]")
        self.assertEqual(ports.reachable("10.0.0.7"), "10.0.0.7")
        for wrong in ("8086", ":8086", "host:", "host:port", "host:0", "host:65536"):
            with self.assertRaises(ValueError, msg=wrong):
                ports.parse_address(wrong)


if __name__ == "__main__":
    unittest.main()
