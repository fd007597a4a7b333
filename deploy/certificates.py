"""Makes the certificates of a deployment by openssl: an authority of its own, and one certificate for each server.

`make` can be run at any time: it replaces certificates that expire soon or lack a name. An authority that expires soon
gets a successor, which clients trust for a year before it signs.
"""

import ipaddress
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, List, Set

DAY = 86_400
# Extensions of the authority's certificate.
AUTHORITY_KEY = """
basicConstraints = critical, CA:TRUE, pathlen:0
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
"""
# Extensions of a server's certificate; `clientAuth` because a server of a cluster is a client of its peers.
SERVER_KEY = """
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth, clientAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
"""
NEW_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]


@dataclass(frozen=True)
class Lifetimes:
    """In days."""

    authority: int = 3650
    # Above 398 days some clients refuse a certificate.
    server: int = 397
    # A server's certificate that expires within this time is replaced.
    renew: int = 60


@dataclass(frozen=True)
class Server:
    """A server: its names, and the folder of its certificate (`tls.crt`), key (`tls.key`) and both (`tls.pem`)."""

    folder: Path
    names: Set[str]


class Authority:
    """An authority: the files of its certificate and key."""

    def __init__(self, folder: Path, number: int):
        self.number = number
        self.certificate = folder / f"authority-{number}.crt"
        self.key = folder / f"authority-{number}.key"

    @classmethod
    def make(cls, folder: Path, number: int, days: int) -> "Authority":
        authority = cls(folder, number)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            settings, key, certificate = (Path(scratch) / name for name in ("settings", "key", "crt"))
            settings.write_text(f"[req]\ndistinguished_name = name\nx509_extensions = own\n[name]\n[own]\n{AUTHORITY_KEY}")
            openssl(
                "req", "-x509", "-new", *NEW_KEY, "-keyout", key, "-out", certificate, "-days", days,
                "-config", settings, "-subj", f"/CN=vmwatch deployment authority {number}",
            )
            # Readable by the owner only, and mounted into no container.
            install(key, authority.key, 0o400)
            install(certificate, authority.certificate)
        return authority

    def sign(self, server: Server, days: int) -> None:
        """Makes the server's key and certificate."""
        server.folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.certificate.parent) as scratch:
            extensions, request, certificate, key = (Path(scratch) / name for name in ("ext", "csr", "tls.crt", "tls.key"))
            extensions.write_text(f"{SERVER_KEY}subjectAltName = {', '.join(sorted(map(alternative, server.names)))}\n")
            openssl("req", "-new", *NEW_KEY, "-keyout", key, "-out", request, "-subj", f"/CN={server.folder.name}")
            openssl(
                "x509", "-req", "-in", request, "-CA", self.certificate, "-CAkey", self.key, "-out", certificate,
                "-set_serial", f"0x{secrets.token_hex(16)}", "-days", days, "-sha256", "-extfile", extensions,
            )
            both = Path(scratch) / "tls.pem"
            both.write_text(certificate.read_text() + key.read_text())
            for file in (key, certificate, both):
                install(file, server.folder / file.name)


class Certificates:
    """The certificates of a deployment. `folder` contains the authorities; `bundle` is the file that clients trust."""

    def __init__(self, folder: Path, bundle: Path, lifetimes: Lifetimes = Lifetimes()):
        self.folder, self.bundle, self.lifetimes = folder, bundle, lifetimes

    def make(self, servers: Iterable[Server]) -> List[str]:
        """Makes certificates that are missing or expire soon. Returns the names of the servers whose certificate was replaced."""
        if not shutil.which("openssl"):
            sys.exit("deploy/secrets: openssl is not in PATH; install it, then run this again")
        self.folder.mkdir(mode=0o700, exist_ok=True)
        authorities = self.authorities()
        self.write_bundle(authorities, self.bundle)
        replaced = []
        for server in servers:
            if not self.is_valid(server):
                if (server.folder / "tls.crt").exists():
                    replaced.append(server.folder.name)
                self.signing(authorities).sign(server, self.lifetimes.server)
            self.write_bundle(authorities, server.folder / "ca.crt")
        return replaced

    def write_bundle(self, authorities: List[Authority], path: Path) -> None:
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(authority.certificate.read_text() for authority in authorities))
        install(partial, path)

    def authorities(self) -> List[Authority]:
        """The authorities that have not expired, oldest first. Makes a successor if the newest expires soon."""
        numbers = sorted(int(path.stem.partition("-")[2]) for path in self.folder.glob("authority-*.crt"))
        found = [Authority(self.folder, number) for number in numbers]
        living = [authority for authority in found if lasts(authority.certificate, 0)]
        if not living or not lasts(living[-1].certificate, 2 * self.lifetimes.server * DAY):
            living.append(Authority.make(self.folder, numbers[-1] + 1 if numbers else 1, self.lifetimes.authority))
        return living

    def signing(self, authorities: List[Authority]) -> Authority:
        """The oldest authority that outlives the certificates it signs, because clients have trusted it for the longest time."""
        outliving = [one for one in authorities if lasts(one.certificate, self.lifetimes.server * DAY)]
        return outliving[0] if outliving else authorities[-1]

    def is_valid(self, server: Server) -> bool:
        """Whether the server's certificate is trusted, has all names, and lasts long enough."""
        certificate = server.folder / "tls.crt"
        present = all((server.folder / name).exists() for name in ("tls.crt", "tls.key", "tls.pem"))
        return (
            present
            and lasts(certificate, self.lifetimes.renew * DAY)
            and names_of(certificate) == set(map(alternative, server.names))
            and openssl_accepts("verify", "-CAfile", self.bundle, certificate)
        )


def install(file: Path, target: Path, mode: int = 0o444) -> None:
    """Moves a finished file to `target`. All users can read it, because a container's user is not the owner; on the host
    only the owner can enter the folder."""
    file.chmod(mode)
    os.replace(file, target)


def alternative(name: str) -> str:
    """A name or address as openssl writes it."""
    try:
        return f"IP:{ipaddress.ip_address(name)}"
    except ValueError:
        return f"DNS:{name}"


def names_of(certificate: Path) -> Set[str]:
    """`DNS:nats, IP Address:127.0.0.1` below the line with the extension's name."""
    _, _, listed = openssl("x509", "-in", certificate, "-noout", "-ext", "subjectAltName").partition("\n")
    parts = [part.strip() for part in listed.split(",") if part.strip()]
    return {alternative(part.partition(":")[2]) for part in parts}


def lasts(certificate: Path, seconds: int) -> bool:
    return openssl_accepts("x509", "-in", certificate, "-noout", "-checkend", seconds)


def openssl_accepts(*arguments) -> bool:
    return subprocess.run(["openssl", *map(str, arguments)], capture_output=True).returncode == 0


def openssl(*arguments) -> str:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"deploy/secrets: openssl {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout
