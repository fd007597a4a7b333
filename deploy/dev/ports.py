"""Chooses free ports. Ports of an earlier start are reused if they are free, so addresses stay the same."""

import ipaddress
import socket
import zlib
from typing import Callable, Dict, Iterable

from .terminal import Problem

LOOPBACK = "127.0.0.1"
# The range is below the kernel's ephemeral ports (by default from 32768) and above MongoDB's 27017 and the ports of the
# tests (testkit/src/ports.rs).
FIRST, COUNT = 28_000, 4_000


def is_free(port: int, host: str = LOOPBACK) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        # A port with connections in the state TIME_WAIT counts as free, because servers can bind it.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def answers(port: int, host: str = LOOPBACK, timeout: float = 0.5) -> bool:
    """Whether a program accepts connections at the given host and port."""
    try:
        socket.create_connection((host, port), timeout).close()
    except OSError:
        return False
    return True


def accepts(address: str) -> bool:
    """Whether a program accepts connections at a Unix socket's path or at host:port."""
    if not address.startswith("/"):
        host, port = parse_address(address)
        return answers(port, host)
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(0.5)
        try:
            probe.connect(address)
        except OSError:
            return False
    return True


def choose(
    names: Iterable[str], remembered: Dict[str, int], seed: str, free: Callable[[int], bool] = is_free
) -> Dict[str, int]:
    """Chooses a free port for each name. The search starts at a port that depends on `seed` (the checkout), so two
    checkouts rarely collide."""
    chosen: Dict[str, int] = {}
    begin = zlib.crc32(seed.encode())
    candidates = iter([FIRST + (begin + step) % COUNT for step in range(COUNT)])
    for name in names:
        port = remembered.get(name)
        while port is None or port in chosen.values() or not free(port):
            port = next(candidates, None)
            if port is None:
                raise Problem(f"no port from {FIRST} to {FIRST + COUNT - 1} is free on {LOOPBACK}")
        chosen[name] = port
    return chosen


def parse_address(text: str):
    """Parses `host:port` or `[v6]:port`."""
    host, colon, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"`{text}` is not HOST:PORT")
    return host, int(port)


def has_loopback(host: str) -> bool:
    """Whether a program that listens on `host` can be reached at a loopback address."""
    if host in ("localhost", "0.0.0.0", "::"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def reachable(host: str) -> str:
    """Returns the host name or address at which this machine reaches a program that listens on `host`."""
    return {"0.0.0.0": LOOPBACK, "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
