import socket
import unittest

from dev import ports
from dev.terminal import Problem


class Choose(unittest.TestCase):
    def test_free_ports_of_an_earlier_start_are_reused(self):
        chosen = ports.choose(["nats", "auth"], {"nats": 28111, "auth": 28112}, "here", lambda port: port != 28112)
        self.assertEqual(chosen["nats"], 28111)
        self.assertNotEqual(chosen["auth"], 28112)

    def test_chosen_ports_are_distinct_and_in_range(self):
        names = [str(number) for number in range(50)]
        chosen = ports.choose(names, {"0": 28000, "1": 28000}, "here", lambda port: port % 2 == 0)
        self.assertEqual(len(set(chosen.values())), len(names))
        for port in chosen.values():
            self.assertEqual(port % 2, 0)
            self.assertTrue(ports.FIRST <= port < ports.FIRST + ports.COUNT)

    def test_each_checkout_searches_ports_from_its_own_constant_start(self):
        def first(seed):
            return ports.choose(["nats"], {}, seed, lambda port: True)["nats"]

        self.assertEqual(first("/home/a"), first("/home/a"))
        self.assertNotEqual(first("/home/a"), first("/home/b"))

    def test_choosing_ports_fails_if_none_is_free(self):
        with self.assertRaises(Problem):
            ports.choose(["nats"], {}, "here", lambda port: False)


class Probes(unittest.TestCase):
    def test_port_with_a_listener_is_not_free(self):
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
    def test_addresses_are_parsed_and_wildcards_mapped_to_loopback(self):
        self.assertEqual(ports.parse_address("127.0.0.1:8086"), ("127.0.0.1", 8086))
        self.assertEqual(ports.parse_address("[::1]:8086"), ("::1", 8086))
        self.assertEqual(ports.reachable("0.0.0.0"), "127.0.0.1")
        self.assertEqual(ports.reachable("::"), "[::1]")
        self.assertEqual(ports.reachable("::1"), "[::1]")
        self.assertEqual(ports.reachable("10.0.0.7"), "10.0.0.7")
        for invalid in ("8086", ":8086", "host:", "host:port", "host:0", "host:65536"):
            with self.assertRaises(ValueError, msg=invalid):
                ports.parse_address(invalid)


if __name__ == "__main__":
    unittest.main()
