"""Runs a real Keystone on SQLite, for tests only. `serve_keystone.py FOLDER PORT COMPUTE_URL` creates its database, users
and catalogue, and serves. When it is ready, it writes addresses and credentials to FOLDER/identity.json.

It runs in a Python environment with requirements.txt; `./dev peer nova` starts it.
"""

import getpass
import grp
import json
import os
import secrets
import subprocess
import sys
import threading
from pathlib import Path
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from keystoneauth1 import session
from keystoneauth1.identity import v3
from keystoneclient.v3 import client

REGION = "RegionOne"
CONFIGURATION = """[DEFAULT]
log_file = {folder}/keystone.log
[cache]
enabled = false
[database]
connection = sqlite:///{folder}/keystone.db
[fernet_tokens]
key_repository = {folder}/fernet
[fernet_receipts]
key_repository = {folder}/fernet
[credential]
key_repository = {folder}/fernet
"""


class Threading(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class Quiet(WSGIRequestHandler):
    def log_message(self, *_):
        pass


def manage(configuration: Path, *arguments: str, **environment: str) -> None:
    program = Path(sys.executable).with_name("keystone-manage")
    subprocess.run([program, "--config-file", configuration, *arguments], env={**os.environ, **environment}, check=True)


def make(folder: Path, url: str) -> str:
    """Creates the database, the keys and the first administrator. Returns the administrator's password."""
    configuration = folder / "keystone.conf"
    configuration.write_text(CONFIGURATION.format(folder=folder))
    os.environ["OS_KEYSTONE_CONFIG_FILES"] = str(configuration)
    manage(configuration, "db_sync")
    user, group = getpass.getuser(), grp.getgrgid(os.getegid()).gr_name
    manage(configuration, "fernet_setup", "--keystone-user", user, "--keystone-group", group)
    password = secrets.token_urlsafe()
    urls = [f"--bootstrap-{interface}-url={url}" for interface in ("admin", "internal", "public")]
    manage(
        configuration, "bootstrap", f"--bootstrap-region-id={REGION}", *urls, OS_BOOTSTRAP_PASSWORD=password,
    )
    return password


def login(url: str, user: str, password: str, project: str) -> session.Session:
    return session.Session(v3.Password(
        auth_url=url, username=user, password=password, project_name=project,
        user_domain_id="default", project_domain_id="default",
    ))


def populate(url: str, admin_password: str, compute_url: str) -> dict:
    """Creates a project, a user with only the role `member` and an application credential, and registers Nova's address."""
    admin = client.Client(session=login(url, "admin", admin_password, "admin"))
    compute = admin.services.create("nova", type="compute")
    admin.endpoints.create(compute, compute_url, interface="public", region=REGION)
    project = admin.projects.create("vms", domain="default")
    password = secrets.token_urlsafe()
    user = admin.users.create("vmwatch", domain="default", password=password)
    admin.roles.grant(admin.roles.find(name="member"), user=user, project=project)
    own = client.Client(session=login(url, "vmwatch", password, "vms"))
    credential = own.application_credentials.create("vmwatch")
    return {
        "auth_url": url, "username": "vmwatch", "password": password, "project": "vms",
        "application_credential_id": credential.id, "application_credential_secret": credential.secret,
        "admin_password": admin_password,
    }


def main() -> None:
    folder, port, compute_url = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    # The arguments are removed, because Keystone would parse them as its own.
    del sys.argv[1:]
    os.umask(0o077)
    url = f"http://127.0.0.1:{port}/v3"
    password = make(folder, url)

    from keystone.server.wsgi import initialize_public_application

    server = make_server("127.0.0.1", port, initialize_public_application(), Threading, Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    partial = folder / "identity.partial"
    partial.write_text(json.dumps(populate(url, password, compute_url)))
    partial.rename(folder / "identity.json")
    threading.Event().wait()


if __name__ == "__main__":
    main()
