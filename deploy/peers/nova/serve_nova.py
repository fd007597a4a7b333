"""Runs a real Nova with its fake compute driver, for tests only. `serve_nova.py FOLDER PORT` starts Nova's API, scheduler,
conductor and compute service in the same way as Nova's own functional tests, with Placement and stand-ins for the other
services, and creates servers in several states. The Keystone described in FOLDER/identity.json authenticates requests.
When Nova is ready, its addresses and credentials are written to FOLDER/cloud.json.

It runs in a Python environment with requirements.txt; `./dev peer nova` starts it.
"""

# This module is imported first, because it replaces Python's sockets and threads with those of eventlet.
from nova.tests.functional import integrated_helpers  # isort: skip

import json
import sys
import unittest
import warnings
from pathlib import Path

import eventlet
import eventlet.wsgi
from keystoneauth1 import adapter, session
from keystoneauth1.identity import v3
from nova.tests.fixtures.glance import GlanceFixture

# Names of servers that are switched off, one for each test. An administrator locks the last one.
NAMES = ["verbs", "credential", "crowd", "locked"]
# Names of further servers, each with the action that brings it from ACTIVE into a state, and the status of this state.
STATES = {
    "paused": ({"pause": None}, "PAUSED"),
    "suspended": ({"suspend": None}, "SUSPENDED"),
    "shelved": ({"shelve": None}, "SHELVED_OFFLOADED"),
    "rescued": ({"rescue": {}}, "RESCUE"),
    "resized": ({"resize": {"flavorRef": "2"}}, "VERIFY_RESIZE"),
}
# This API version supports `networks: none`, and answers 409 if a server is locked.
VERSION = {"OpenStack-API-Version": "compute 2.84"}
PATIENCE = 60

FOLDER, PORT = Path(sys.argv[1]), int(sys.argv[2])
URL = f"http://127.0.0.1:{PORT}/v2.1"
IDENTITY = json.loads((FOLDER / "identity.json").read_text())


class Cloud(integrated_helpers._IntegratedTestBase):
    STUB_KEYSTONE = False

    def setUp(self):
        # Nova's own configuration file, extended by the credentials with which it checks tokens at Keystone.
        paste = FOLDER / "api-paste.ini"
        original = Path(sys.prefix, "etc/nova/api-paste.ini").read_text()
        section = "[filter:authtoken]\n"
        settings = {
            "auth_type": "password", "auth_url": IDENTITY["auth_url"], "www_authenticate_uri": IDENTITY["auth_url"],
            "username": "admin", "password": IDENTITY["admin_password"], "project_name": "admin",
            "user_domain_id": "default", "project_domain_id": "default",
        }
        lines = "".join(f"{name} = {value}\n" for name, value in settings.items())
        paste.write_text(original.replace(section, section + lines))
        self._paste = str(paste)
        super().setUp()

    def _setup_services(self):
        self.flags(api_paste_config=self._paste, group="wsgi")
        # There is one host only.
        self.flags(allow_resize_to_same_host=True)
        super()._setup_services()

    def runTest(self):
        # Nova's tests turn warnings into errors. With such errors, a stop request would be accepted but fail silently.
        warnings.resetwarnings()
        warnings.simplefilter("ignore")
        listener = eventlet.listen(("127.0.0.1", PORT))
        serving = eventlet.spawn(eventlet.wsgi.server, listener, self.api_fixture.app(), log_output=False)
        servers = self._servers()
        partial = FOLDER / "cloud.partial"
        partial.write_text(json.dumps({**IDENTITY, "servers": servers}))
        partial.rename(FOLDER / "cloud.json")
        serving.wait()

    def _servers(self) -> dict:
        own = _client(IDENTITY["username"], "password", IDENTITY["project"])
        admin = _client("admin", "admin_password", "admin")
        made = {}
        for name in [*NAMES, *STATES, "error"]:
            server = {"name": name, "imageRef": GlanceFixture.image1["id"], "flavorRef": "1", "networks": "none"}
            made[name] = own.post("/servers", json={"server": server}).json()["server"]["id"]
        states = {**{name: ({"os-stop": None}, "SHUTOFF") for name in NAMES}, **STATES}
        for name, identity in made.items():
            _await(own, identity, "ACTIVE")
            if name in states:
                own.post(f"/servers/{identity}/action", json=states[name][0])
        for name, (_, status) in states.items():
            _await(own, made[name], status)
        admin.post(f"/servers/{made['locked']}/action", json={"lock": None})
        admin.post(f"/servers/{made['error']}/action", json={"os-resetState": {"state": "error"}})
        _await(own, made["error"], "ERROR")
        return made


def _client(user: str, password: str, project: str) -> adapter.Adapter:
    auth = v3.Password(
        auth_url=IDENTITY["auth_url"], username=user, password=IDENTITY[password], project_name=project,
        user_domain_id="default", project_domain_id="default",
    )
    return adapter.Adapter(session.Session(auth), endpoint_override=URL, additional_headers=VERSION)


def _await(client, identity: str, status: str) -> None:
    with eventlet.Timeout(PATIENCE):
        while client.get(f"/servers/{identity}").json()["server"]["status"] != status:
            eventlet.sleep(0.1)


if __name__ == "__main__":
    result = unittest.TextTestRunner().run(Cloud())
    sys.exit(not result.wasSuccessful())
