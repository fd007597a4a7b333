"""The NATS server of a stack: the configuration in deploy/nats, with secrets of its own below .dev, and without TLS because it
listens only on the loopback address.

The end-to-end tests start a server in the same way (testkit/src/secrets.rs).
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Dict

from . import layout, processes
from .terminal import Step

# The folder of `deploy/secrets`, and the one with the server's configuration.
SECRETS = layout.DOT / "secrets"
CONFIG = layout.DOT / "nats-config"
STORE = layout.DOT / "nats"
# The accounts of the services: without a configuration and in deploy/nats/accounts.conf.
FORMER_ACCOUNT, ACCOUNT = "$G", "VMWATCH"
# The settings of a program that log it in to NATS.
LOGIN = (
    "VMWATCH_NATS_URL", "VMWATCH_NATS_USER", "VMWATCH_NATS_PASSWORD_FILE", "VMWATCH_NATS_CREDENTIALS_FILE",
    "VMWATCH_NATS_NKEY_SEED_FILE", "VMWATCH_NATS_CERTIFICATE_FILE", "VMWATCH_NATS_KEY_FILE", "VMWATCH_NATS_CA_FILE",
)


def prepare() -> Path:
    """Creates missing secrets and writes the server's configuration. Returns the path of its main file."""
    with Step("making the secrets of NATS") as step:
        command = [sys.executable, layout.ROOT / "deploy" / "secrets", "--store", SECRETS]
        processes.run(step, command, layout.LOGS / "secrets.log")
        step.done()
    keep_data(STORE)
    return write_config(layout.ROOT / "deploy" / "nats", SECRETS / "nats-server", CONFIG, STORE)


def keep_data(store: Path) -> None:
    """Moves what an earlier ./dev stored, whose NATS server had no accounts, to the account of the services."""
    former, now = (store / "jetstream" / account for account in (FORMER_ACCOUNT, ACCOUNT))
    if former.exists() and not now.exists():
        former.rename(now)


def write_config(deployed: Path, secrets: Path, folder: Path, store: Path) -> Path:
    """Writes the deployed configuration for a server that listens only on the loopback address and stores its data in `store`.
    The names of the folders are those of the includes."""
    config, copied = folder / "nats", folder / "nats-secrets"
    for path in (config, copied):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        path.chmod(0o700)
    for name in ("users.conf", "system.conf", "callout.conf"):
        shutil.copy(secrets / name, copied)
    for name in ("accounts.conf", "permissions.conf"):
        shutil.copy(deployed / name, config)
    text = (deployed / "nats.conf").read_text()
    # The command line sets address and port. Nothing here uses the monitoring port.
    for line in ('listen: "0.0.0.0:4222"', "include tls.conf", "include websocket.conf", 'http: "127.0.0.1:8222"'):
        text = replaced(text, f"\n{line}\n", "\n")
    path = config / "nats.conf"
    path.write_text(replaced(text, 'store_dir: "/data"', f"store_dir: {json.dumps(str(store))}"))
    return path


def replaced(text: str, old: str, new: str) -> str:
    if text.count(old) != 1:
        raise ValueError(f"deploy/nats/nats.conf does not contain {old.strip()!r} once")
    return text.replace(old, new)


def login(user: str) -> Dict[str, str]:
    """Returns the settings with which a program logs in as this user."""
    return {"VMWATCH_NATS_USER": user, "VMWATCH_NATS_PASSWORD_FILE": str(SECRETS / "nats" / user)}


def callout() -> Dict[str, str]:
    """Returns the settings with which auth-svc decides on the logins of agents."""
    keys = SECRETS / "callout"
    return {
        "VMWATCH_CALLOUT_NKEY_SEED_FILE": str(keys / "nkey-seed"),
        "VMWATCH_CALLOUT_ISSUER_SEED_FILE": str(keys / "issuer-seed"),
    }


def alert_key() -> Path:
    """Returns the file of the key with which alert-svc seals the secrets of channels; `prepare` creates it."""
    return SECRETS / "alert-key"
