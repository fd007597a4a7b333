"""Installs missing Debian packages, and fetches packages of another release from the mirror that apt uses."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional

from . import processes
from .terminal import Problem, Step

# Options that let apt wait up to 300 s for another running apt or dpkg.
WAIT_FOR_LOCK = "DPkg::Lock::Timeout=300"
SUITE_NAMES = {"stable", "oldstable", "testing", "unstable", "sid"}


@dataclass(frozen=True)
class Source:
    """A package archive that apt's configuration lists."""

    uri: str
    suites: tuple
    components: tuple
    signed_by: str = ""

    def serves_release(self, codename: str) -> bool:
        """Whether the archive has complete Debian releases, not only security fixes, updates or third-party packages."""
        return "main" in self.components and bool({codename, *SUITE_NAMES} & set(self.suites))

    def stanza(self, suite: str) -> str:
        """Returns this archive in deb822 format, with the suite replaced."""
        text = f"Types: deb\nURIs: {self.uri}\nSuites: {suite}\nComponents: main\n"
        return text + (f"Signed-By: {self.signed_by}\n" if self.signed_by else "")


def parse_deb822(text: str) -> List[Source]:
    """Parses a `.sources` file; see sources.list(5). A stanza with several URIs gives several sources."""
    sources = []
    for stanza in re.split(r"\n[ \t]*\n", re.sub(r"(?m)^#.*\n?", "", text)):
        fields = _fields(stanza)
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() in ("no", "false"):
            continue
        for uri in fields.get("uris", "").split():
            sources.append(
                Source(
                    uri,
                    tuple(fields.get("suites", "").split()),
                    tuple(fields.get("components", "").split()),
                    fields.get("signed-by", ""),
                )
            )
    return sources


def _fields(stanza: str) -> Dict[str, str]:
    fields: Dict[str, str] = {}
    name = ""
    for line in stanza.splitlines():
        if line[:1] in (" ", "\t") and name:
            # A continuation line is kept unchanged, for example a line of a key that the stanza contains.
            fields[name] += "\n" + line.rstrip()
        elif ":" in line:
            name, _, value = line.partition(":")
            name = name.strip().lower()
            fields[name] = value.strip()
    return fields


def parse_list(text: str) -> List[Source]:
    """Parses a `.list` file, which has one archive per line: `deb [options] uri suite components…`."""
    sources = []
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)((?:\s+\S+)*)", line.partition("#")[0])
        if match:
            options = dict(re.findall(r"(\S+?)\+?=(\S+)", match[1] or ""))
            sources.append(
                Source(match[2], (match[3],), tuple(match[4].split()), options.get("signed-by", "").replace(",", " "))
            )
    return sources


def sources(etc: Path = Path("/etc/apt")) -> List[Source]:
    found = []
    for path in [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]:
        parse = {".list": parse_list, ".sources": parse_deb822}.get(path.suffix)
        if parse and path.is_file():
            found += parse(path.read_text(errors="replace"))
    return found


def codename(os_release: Path = Path("/etc/os-release")) -> str:
    try:
        match = re.search(r'(?m)^VERSION_CODENAME="?([^"\n]*)', os_release.read_text())
    except OSError:
        return ""
    return match[1] if match else ""


def is_here() -> bool:
    return shutil.which("apt-get") is not None and shutil.which("dpkg-deb") is not None


def install(packages: List[str], log: Path) -> None:
    """Installs Debian packages, as root or with sudo."""
    names = " ".join(packages)
    environment = ["env", "DEBIAN_FRONTEND=noninteractive"]
    command = [*_as_root(names), *environment, "apt-get", "-q", "-o", WAIT_FOR_LOCK]
    with Step("refreshing the package lists (apt-get update)") as step:
        processes.run(step, [*command, "update"], log)
        step.done()
    with Step(f"installing {names} (apt-get install)") as step:
        processes.run(step, [*command, "install", "--yes", "--no-install-recommends", *packages], log)
        step.done()


def _as_root(names: str) -> List[str]:
    if os.geteuid() == 0:
        return []
    if shutil.which("sudo"):
        if sys.stdin.isatty():
            # sudo asks for the password now, before a progress line could hide the prompt.
            subprocess.run(["sudo", "-v"], check=False)
        return ["sudo", "-n"]
    raise Problem(f"these Debian packages are missing: {names}", f"Run as root: apt-get install {names}")


def fetch(package: str, suite: str, into: Path, log: Path) -> Path:
    """Downloads `package` of another `suite` and unpacks it into `into`, without changing the system.

    The mirror and key come from the machine's own apt configuration. apt's lists and caches are in a private folder, so that
    neither root nor changes in /etc are needed.
    """
    release = codename()
    candidates = [source for source in sources() if source.serves_release(release)]
    if not candidates:
        raise Problem(
            f"cannot fetch {package}: apt's sources contain no archive of Debian {release or 'releases'}"
        )
    # Debian's own archive is preferred to third-party archives with the same layout.
    candidates.sort(key=lambda source: "debian-archive" not in source.signed_by)
    failure: Optional[Problem] = None
    for source in candidates:
        try:
            return _fetch_from(source, package, suite, into, log)
        except Problem as problem:
            failure = failure or problem
    raise failure


def _fetch_from(source: Source, package: str, suite: str, into: Path, log: Path) -> Path:
    for folder in ("lists/partial", "cache/archives/partial"):
        (into / folder).mkdir(parents=True, exist_ok=True)
    (into / "apt.sources").write_text(source.stanza(suite))
    command = ["apt-get", "-q"]
    for option in (
        f"Dir::Etc::SourceList={into}/apt.sources",
        "Dir::Etc::SourceParts=-",
        f"Dir::State::Lists={into}/lists",
        f"Dir::Cache={into}/cache",
        "Acquire::Languages=none",
        "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false",
        # apt checks the signatures of the package lists but not their age, because mirrors of a testing release lag
        # behind. The caller checks the version of the package.
        "Acquire::Check-Valid-Until=false",
        # apt downloads as the current user, because its own download user cannot write to a folder in a home folder.
        "APT::Sandbox::User=root",
    ):
        command += ["-o", option]
    with Step(f"fetching {package} of Debian {suite} from apt's mirror") as step:
        processes.run(step, [*command, "update"], log)
        processes.run(step, [*command, "download", package], log, cwd=into)
        (deb,) = into.glob(f"{package}_*.deb")
        subprocess.run(["dpkg-deb", "-x", deb, into / "unpacked"], check=True)
        step.done(deb.name)
    return into / "unpacked"
