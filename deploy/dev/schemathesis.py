"""schemathesis, which tries the REST API against its own document: in an environment of its own, in the cache."""

from pathlib import Path

from . import layout, venv

# Every package with its version, so that the same checks run everywhere.
REQUIREMENTS = layout.ROOT / "tests" / "schemathesis" / "requirements.txt"
# What schemathesis asks for.
LEAST = (3, 10)


def program() -> Path:
    """Its program, installed where it is missing or the requirements have changed."""
    otherwise = ", or name a schemathesis by VMWATCH_TEST_SCHEMATHESIS"
    return venv.environment("schemathesis", REQUIREMENTS, LEAST, otherwise) / "bin" / "schemathesis"
