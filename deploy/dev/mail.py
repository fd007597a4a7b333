"""Installs aiosmtpd, the mail server that tests send notifications to, into the cache."""

from pathlib import Path

from . import layout, venv

# The versions of all packages are pinned, so the same server runs everywhere.
REQUIREMENTS = layout.ROOT / "tests" / "mail" / "requirements.txt"
# The minimum Python version that the packages support.
LEAST = (3, 10)


def python() -> Path:
    """Returns the Python that has aiosmtpd, which is installed if missing or if the requirements have changed."""
    otherwise = ", or set VMWATCH_TEST_MAIL_PYTHON to a Python with aiosmtpd"
    return venv.environment("aiosmtpd", REQUIREMENTS, LEAST, otherwise) / "bin" / "python"
