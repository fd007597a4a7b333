"""Installs schemathesis, which tests the REST API against its OpenAPI document, into the cache."""

from pathlib import Path

from . import layout, venv

# The versions of all packages are pinned, so the same checks run everywhere.
REQUIREMENTS = layout.ROOT / "tests" / "schemathesis" / "requirements.txt"
# The minimum Python version that schemathesis supports.
LEAST = (3, 10)


def program() -> Path:
    """Returns the path of schemathesis, which is installed if missing or if the requirements have changed."""
    otherwise = ", or set VMWATCH_TEST_SCHEMATHESIS to the program"
    return venv.environment("schemathesis", REQUIREMENTS, LEAST, otherwise) / "bin" / "schemathesis"
