"""Creates the certificates of a deployment with openssl: a certificate authority, and one certificate for each server.

`make` can be repeated at any time: it replaces certificates that expire soon or lack a name. Before an authority expires,
a second one is created. Clients trust both, and after a year the second one starts to sign certificates.
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
# X.509 extensions of the authority's certificate.
AUTHORITY_KEY = """
basicConstraints = critical, CA:TRUE, pathlen:0
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
"""
# X.509 extensions of a server's certificate. `clientAuth` is included because a server of a cluster is also a client of
# the other servers.
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
    """Validity periods, in days."""

    authority: int = 3650
    # Some clients refuse certificates that are valid for more than 398 days.
    server: int = 397
    # A server's certificate that expires within this number of days is replaced.
    renew: int = 60


@dataclass(frozen=True)
class Server:
    """A server with its names, and the folder with its certificate (tls.crt), its key (tls.key) and a file with both (tls.pem)."""

    folder: Path
    names: Set[str]


class Authority:
    """A certificate authority: the files with its certificate and its key."""

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
            # The authority's key is readable only by its owner and is not mounted into any container.
            install(key, authority.key, 0o400)
            install(certificate, authority.certificate)
        return authority

    def sign(self, server: Server, days: int) -> None:
        """Creates the server's key and certificate."""
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
    """The certificates of a deployment. `folder` contains the authorities; `bundle` is the file with those that clients trust."""

    def __init__(self, folder: Path, bundle: Path, lifetimes: Lifetimes = Lifetimes()):
        self.folder, self.bundle, self.lifetimes = folder, bundle, lifetimes

    def make(self, servers: Iterable[Server]) -> List[str]:
        """Creates missing certificates and replaces those that expire soon. Returns the servers whose certificate was replaced."""
        if not shutil.which("openssl"):
            sys.exit("deploy/secrets: openssl is not in PATH; install it, then run deploy/secrets again")
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
        """Returns the authorities that have not expired, oldest first. Creates another one if the newest expires soon."""
        numbers = sorted(int(path.stem.partition("-")[2]) for path in self.folder.glob("authority-*.crt"))
        found = [Authority(self.folder, number) for number in numbers]
        living = [authority for authority in found if lasts(authority.certificate, 0)]
        if not living or not lasts(living[-1].certificate, 2 * self.lifetimes.server * DAY):
            living.append(Authority.make(self.folder, numbers[-1] + 1 if numbers else 1, self.lifetimes.authority))
        return living

    def signing(self, authorities: List[Authority]) -> Authority:
        """Returns the oldest authority that outlives the certificates it signs; most clients already trust it."""
        outliving = [one for one in authorities if lasts(one.certificate, self.lifetimes.server * DAY)]
        return outliving[0] if outliving else authorities[-1]

    def is_valid(self, server: Server) -> bool:
        """Whether the server's certificate is signed by a trusted authority, has all names, and does not expire soon."""
        certificate = server.folder / "tls.crt"
        present = all((server.folder / name).exists() for name in ("tls.crt", "tls.key", "tls.pem"))
        return (
            present
            and lasts(certificate, self.lifetimes.renew * DAY)
            and names_of(certificate) == set(map(alternative, server.names))
            and openssl_accepts("verify", "-CAfile", self.bundle, certificate)
        )


def install(file: Path, target: Path, mode: int = 0o444) -> None:
    """Moves a finished file to `target`. The file is readable by all users, because a container's user is not the owner.
    On the host, only the owner can enter the folder."""
    file.chmod(mode)
    os.replace(file, target)


def alternative(name: str) -> str:
    """Formats a host name or IP address in the way openssl prints it."""
    try:
        return f"IP:{ipaddress.ip_address(name)}"
    except ValueError:
        return f"DNS:{name}"


def names_of(certificate: Path) -> Set[str]:
    """Finds the names of a certificate in openssl's output: the line below the name of the extension."""
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
