import subprocess
import tempfile
import unittest
from pathlib import Path

import nkeys

DEPLOY = Path(__file__).resolve().parents[2]


class Keys(unittest.TestCase):
    def test_public_key_of_known_seed(self):
        """The pair is from the documentation of NATS."""
        seed = "SUACSSL3UAHUDXKFSNVUZRF5UHPMWZ6BFDTJ7M6USDXIEDNPPQYYYCU3VY"
        self.assertEqual(nkeys.public_key(seed), "UDXU4RCSJNZOIQHZNWXHXORDPRTGNJAHAHFRGZNEEJCPQTT2M7NLCNF4")

    def test_new_seeds_differ_and_have_their_type(self):
        for kind, seed_prefix, prefix in [(nkeys.USER, "SU", "U"), (nkeys.ACCOUNT, "SA", "A")]:
            seeds = [nkeys.seed(kind) for _ in range(2)]
            self.assertNotEqual(*seeds)
            for seed in seeds:
                self.assertEqual((seed[:2], len(seed)), (seed_prefix, 58))
                self.assertEqual((nkeys.public_key(seed)[:1], len(nkeys.public_key(seed))), (prefix, 56))


class Secrets(unittest.TestCase):
    def test_nats_gets_public_keys_that_do_not_change(self):
        with tempfile.TemporaryDirectory() as folder:
            command = [DEPLOY / "secrets", "--store", folder]
            subprocess.run(command, check=True, capture_output=True)
            files = sorted(Path(folder, "nats-server").glob("*.conf"))
            before = {path.name: path.read_text() for path in files}
            seeds = {name: Path(folder, "callout", name).read_text().strip() for name in ("nkey-seed", "issuer-seed")}
            self.assertIn(nkeys.public_key(seeds["issuer-seed"]), before["callout.conf"])
            self.assertIn(nkeys.public_key(seeds["nkey-seed"]), before["callout.conf"])
            self.assertIn(nkeys.public_key(seeds["nkey-seed"]), before["system.conf"])
            for text in before.values():
                self.assertNotRegex(text, "S[AU][A-Z2-7]{56}")
            subprocess.run(command, check=True, capture_output=True)
            self.assertEqual(before, {path.name: path.read_text() for path in files})


if __name__ == "__main__":
    unittest.main()
