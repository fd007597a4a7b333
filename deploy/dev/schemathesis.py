"""Installs schemathesis, which tests the REST API against its OpenAPI document, into the cache."""

from pathlib import Path

from . import layout, venv

# Every package is pinned, so that the same checks run everywhere.
REQUIREMENTS = layout.ROOT / "tests" / "schemathesis" / "requirements.txt"
# Required by schemathesis.
LEAST = (3, 10)


def program() -> Path:
    """The path of its program, installed if missing or if the requirements have changed."""
    otherwise = ", or set VMWATCH_TEST_SCHEMATHESIS to the program"
    return venv.environment("schemathesis", REQUIREMENTS, LEAST, otherwise) / "bin" / "schemathesis"
