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
from nova import context, objects
from nova.tests.fixtures.glance import GlanceFixture

STOP, SHELVE, LOCK, RESIZE = {"os-stop": None}, {"shelve": None}, {"lock": None}, {"resize": {"flavorRef": "2"}}
RESET = {"os-resetState": {"state": "error"}}
# The servers, each with the actions that bring it from ACTIVE into a state, and the status of this state. "delete" is a
# request of its own.
STATES = {
    # One server for each test that starts it.
    **{name: ([STOP], "SHUTOFF") for name in ("verbs", "credential", "crowd")},
    "locked": ([STOP, LOCK], "SHUTOFF"),
    "locked_for_admin": ([STOP, LOCK], "SHUTOFF"),
    "paused": ([{"pause": None}], "PAUSED"),
    "suspended": ([{"suspend": None}], "SUSPENDED"),
    "shelved": ([SHELVE], "SHELVED"),
    "offloaded": ([SHELVE, {"shelveOffload": None}], "SHELVED_OFFLOADED"),
    "rescued": ([{"rescue": {}}], "RESCUE"),
    "resized": ([RESIZE], "VERIFY_RESIZE"),
    "resized_off": ([STOP, RESIZE], "VERIFY_RESIZE"),
    "error": ([RESET], "ERROR"),
    "error_off": ([STOP, RESET], "ERROR"),
    "soft_deleted": (["delete"], "SOFT_DELETED"),
    "dead": ([], "ACTIVE"),
    "out_of_sync": ([STOP], "SHUTOFF"),
    "resizing": ([], "RESIZE"),
    "reverting": ([RESIZE], "REVERT_RESIZE"),
    "rebuilding": ([], "REBUILD"),
    "password": ([], "PASSWORD"),
    "migrating": ([], "MIGRATING"),
    "host_down": ([], "ACTIVE"),
}
# Actions that only an administrator may do.
OF_ADMIN = {"lock", "shelveOffload", "os-resetState"}
# A host that an administrator has declared down.
HOST_DOWN = "host-down"
# What no action leaves behind is written to Nova's database: a task in progress, a guest whose state is not that of its
# server (1: running, 4: off), and the host that is down.
WRITTEN = {
    "dead": {"power_state": 4},
    "out_of_sync": {"power_state": 1},
    "resizing": {"task_state": "resize_migrating"},
    "reverting": {"task_state": "resize_reverting"},
    "rebuilding": {"task_state": "rebuilding"},
    "password": {"task_state": "updating_password"},
    "migrating": {"task_state": "migrating"},
    "host_down": {"host": HOST_DOWN},
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
        # Nova keeps what is shelved or deleted until an administrator acts, and the host has room for all servers.
        self.flags(shelved_offload_time=-1, reclaim_instance_interval=3600, compute_driver="fake.FakeDriver")
        self.flags(instances=-1, cores=-1, ram=-1, group="quota")
        super()._setup_services()

    def runTest(self):
        # Nova's tests turn warnings into errors. With such errors, a stop request would be accepted but fail silently.
        warnings.resetwarnings()
        warnings.simplefilter("ignore")
        listener = eventlet.listen(("127.0.0.1", PORT))
        serving = eventlet.spawn(eventlet.wsgi.server, listener, self.api_fixture.app(), log_output=False)
        admin = _client("admin", "admin_password", "admin")
        self._add_host_down(admin)
        partial = FOLDER / "cloud.partial"
        partial.write_text(json.dumps({**IDENTITY, "servers": _servers(admin)}))
        partial.rename(FOLDER / "cloud.json")
        serving.wait()

    def _add_host_down(self, admin) -> None:
        self._start_compute(HOST_DOWN)
        services = admin.get("/os-services", params={"host": HOST_DOWN, "binary": "nova-compute"}).json()["services"]
        admin.put(f"/os-services/{services[0]['id']}", json={"forced_down": True})


def _servers(admin) -> dict:
    own = _client(IDENTITY["username"], "password", IDENTITY["project"])
    made = {name: _make(own, name) for name in STATES}
    for name, (actions, status) in STATES.items():
        path = f"/servers/{made[name]}"
        _await(own, made[name], "ACTIVE")
        for action in actions:
            if action == "delete":
                own.delete(path)
            else:
                # Each action has ended when it is answered, because Nova's tests replace casts by calls.
                (admin if OF_ADMIN & set(action) else own).post(f"{path}/action", json=action)
        if name in WRITTEN:
            _write(made[name], WRITTEN[name])
        _await(own, made[name], status)
    return made


def _make(client, name: str) -> str:
    server = {"name": name, "imageRef": GlanceFixture.image1["id"], "flavorRef": "1", "networks": "none"}
    return client.post("/servers", json={"server": server}).json()["server"]["id"]


def _write(identity: str, values: dict) -> None:
    admin = context.get_admin_context()
    mapping = objects.InstanceMapping.get_by_instance_uuid(admin, identity)
    with context.target_cell(admin, mapping.cell_mapping) as cell:
        instance = objects.Instance.get_by_uuid(cell, identity)
        instance.update(values)
        instance.save()


def _client(user: str, password: str, project: str) -> adapter.Adapter:
    auth = v3.Password(
        auth_url=IDENTITY["auth_url"], username=user, password=IDENTITY[password], project_name=project,
        user_domain_id="default", project_domain_id="default",
    )
    return adapter.Adapter(session.Session(auth), endpoint_override=URL, additional_headers=VERSION)


def _await(client, identity: str, status: str) -> None:
    with eventlet.Timeout(PATIENCE):
        while True:
            server = client.get(f"/servers/{identity}").json()["server"]
            if server["status"] == status:
                return
            if server["status"] == "ERROR":
                raise RuntimeError(f"{server['name']} is not {status}, but ERROR: {server.get('fault')}")
            eventlet.sleep(0.1)


if __name__ == "__main__":
    result = unittest.TextTestRunner().run(Cloud())
    sys.exit(not result.wasSuccessful())
