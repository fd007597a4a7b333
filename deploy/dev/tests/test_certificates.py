import stat
import subprocess
import tempfile
import unittest
from pathlib import Path

from certificates import Certificates, Lifetimes, Server, lasts, names_of


class Deployment(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.folder = Path(scratch.name)

    def make(self, lifetimes=Lifetimes(), names=("nats", "127.0.0.1", "::1")):
        certificates = Certificates(self.folder / "authorities", self.folder / "ca.crt", lifetimes)
        return certificates.make([Server(self.folder / "nats", set(names))])

    def read(self, name):
        return (self.folder / name).read_text()

    def issuer(self):
        command = ["openssl", "x509", "-in", self.folder / "nats/tls.crt", "-noout", "-issuer"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def verify(self):
        command = ["openssl", "verify", "-x509_strict", "-CAfile", self.folder / "ca.crt", self.folder / "nats/tls.crt"]
        subprocess.run(command, check=True, capture_output=True)

    def test_created_certificate_is_trusted_and_has_all_names(self):
        self.assertEqual(self.make(), [])
        self.assertEqual(names_of(self.folder / "nats/tls.crt"), {"DNS:nats", "IP:127.0.0.1", "IP:::1"})
        self.verify()
        self.assertEqual(self.read("nats/tls.pem"), self.read("nats/tls.crt") + self.read("nats/tls.key"))
        self.assertEqual(self.read("nats/ca.crt"), self.read("ca.crt"))

    def test_certificate_that_is_valid_long_enough_is_kept(self):
        self.make()
        before = {path: path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}
        self.assertEqual(self.make(), [])
        self.assertEqual(before, {path: path.read_bytes() for path in self.folder.rglob("*") if path.is_file()})

    def test_certificate_that_expires_soon_is_replaced(self):
        self.make(Lifetimes(server=59, renew=30))
        first = self.read("nats/tls.crt")
        self.assertEqual(self.make(), ["nats"])
        self.assertNotEqual(self.read("nats/tls.crt"), first)
        self.assertTrue(lasts(self.folder / "nats/tls.crt", 396 * 86400))
        self.verify()

    def test_certificate_that_lacks_a_name_is_replaced(self):
        self.make()
        self.assertEqual(self.make(names=["nats", "bus.example.com"]), ["nats"])
        self.assertEqual(names_of(self.folder / "nats/tls.crt"), {"DNS:nats", "DNS:bus.example.com"})

    def test_certificate_of_another_authority_is_replaced(self):
        self.make()
        for file in (self.folder / "authorities").iterdir():
            file.unlink()
        self.assertEqual(self.make(), ["nats"])
        self.verify()

    def test_next_authority_is_trusted_before_it_signs(self):
        # With about two years left, a second authority is created, but the first one signs for another year.
        self.make(Lifetimes(authority=2 * 397 - 10))
        self.assertEqual(self.read("ca.crt").count("BEGIN CERTIFICATE"), 1)
        self.make()
        self.assertEqual(self.read("ca.crt").count("BEGIN CERTIFICATE"), 2)
        self.make(names=["nats"])
        self.assertIn("authority 1", self.issuer())
        self.verify()

    def test_certificate_is_signed_by_an_authority_that_outlives_it(self):
        self.make(Lifetimes(authority=390, server=100))
        self.assertIn("authority 1", self.issuer())
        self.make(names=["nats"])
        self.assertIn("authority 2", self.issuer())
        self.verify()

    def test_authority_key_is_readable_only_by_its_owner(self):
        self.make()
        self.assertEqual(stat.S_IMODE((self.folder / "authorities").stat().st_mode), 0o700)
        self.assertEqual(stat.S_IMODE((self.folder / "authorities/authority-1.key").stat().st_mode), 0o400)


if __name__ == "__main__":
    unittest.main()
