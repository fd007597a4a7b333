import tempfile
import unittest
from pathlib import Path

from dev import apt

DEB822 = """\
# Debian's own
Types: deb deb-src
URIs: http://mirror.example/debian http://other.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main

Enabled: no
Types: deb
URIs: http://off.example/debian
Suites: bookworm
Components: main

Types: deb-src
URIs: http://sources.example/debian
Suites: bookworm
Components: main
"""

INLINE_KEY = """\
Types: deb
URIs: mirror+file:/etc/apt/mirrors/debian.list
Suites: bookworm
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mDMEY865UxYJ
 -----END PGP PUBLIC KEY BLOCK-----
"""

ONE_LINE = """\
deb http://mirror.example/debian bookworm main non-free-firmware
  deb [arch=amd64 signed-by=/a.gpg,/b.gpg] https://mirror.example/debian trixie main # said twice
# deb http://commented.example/debian bookworm main
deb-src http://sources.example/debian bookworm main
deb http://flat.example/packages ./
"""


class Deb822(unittest.TestCase):
    def test_deb822_parser_reads_all_uris_of_enabled_binary_stanzas(self):
        found = apt.parse_deb822(DEB822)
        self.assertEqual(
            [source.uri for source in found],
            ["http://mirror.example/debian", "http://other.example/debian", "http://mirror.example/debian-security"],
        )
        self.assertEqual(found[0].suites, ("bookworm", "bookworm-updates"))
        self.assertEqual(found[0].signed_by, "/usr/share/keyrings/debian-archive-keyring.gpg")
        self.assertEqual(found[2].signed_by, "")

    def test_deb822_parser_keeps_an_inline_key_unchanged(self):
        (source,) = apt.parse_deb822(INLINE_KEY)
        stanza = source.stanza("forky")
        self.assertIn("Suites: forky\n", stanza)
        self.assertEqual(apt.parse_deb822(stanza)[0].signed_by, source.signed_by)
        self.assertIn("\n .\n mDMEY865UxYJ\n", stanza)


class OneLine(unittest.TestCase):
    def test_list_parser_reads_options_and_skips_comments_and_deb_src(self):
        found = apt.parse_list(ONE_LINE)
        self.assertEqual(
            [(source.uri, source.suites) for source in found],
            [
                ("http://mirror.example/debian", ("bookworm",)),
                ("https://mirror.example/debian", ("trixie",)),
                ("http://flat.example/packages", ("./",)),
            ],
        )
        self.assertEqual(found[0].components, ("main", "non-free-firmware"))
        self.assertEqual(found[1].components, ("main",))
        self.assertEqual(found[1].signed_by, "/a.gpg /b.gpg")

    def test_apt_sources_are_read_in_both_formats_and_other_files_ignored(self):
        with tempfile.TemporaryDirectory() as folder:
            parts = Path(folder) / "sources.list.d"
            parts.mkdir()
            (Path(folder) / "sources.list").write_text("deb http://one.example/debian bookworm main\n")
            (parts / "debian.sources").write_text(DEB822)
            (parts / "old.list.save").write_text("deb http://saved.example/debian bookworm main\n")
            uris = [source.uri for source in apt.sources(Path(folder))]
        self.assertEqual(uris[0], "http://one.example/debian")
        self.assertEqual(len(uris), 4)


class Choice(unittest.TestCase):
    def test_only_complete_archives_are_used_for_another_release(self):
        def serves(suite, component="main"):
            return apt.Source("http://mirror.example", (suite,), (component,)).serves_release("bookworm")

        self.assertTrue(serves("bookworm"))
        self.assertTrue(serves("stable"))
        for suite in ("bookworm-security", "bookworm-updates", "nodistro", "cloud-sdk-bookworm", "./"):
            self.assertFalse(serves(suite), suite)
        self.assertFalse(serves("bookworm", component="stable"))

    def test_debian_codename_is_read_from_os_release(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "os-release"
            self.assertEqual(apt.codename(path), "")
            path.write_text('ID=debian\nVERSION_CODENAME="trixie"\n')
            self.assertEqual(apt.codename(path), "trixie")


if __name__ == "__main__":
    unittest.main()
