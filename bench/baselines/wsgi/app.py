"""Baseline of `./dev bench`: the service of 2017 as a single Python WSGI application.

Its answers to methods 611611 and 611711 of the documented API are byte-identical to those of vmwatch. To start it:

    BASELINE_MONGODB=mongodb://127.0.0.1:27017 BASELINE_SESSION=9afdb1ec-… gunicorn --workers 2 app:application
"""

import json
import math
import os

from pymongo import MongoClient

VM_KEYS = [
    "net_incoming", "disk_write", "mem", "net_outgoing", "instance_id", "cpu_util", "disk_read", "create_date", "_id",
    "proc",
]
PROCESS_KEYS = [
    "net_incoming", "shutdown_time", "mem", "net_outgoing", "cmd", "pid", "instance_id", "disk_write", "disk_read",
    "create_date", "_id", "cpu_util", "running_time",
]
# For each method: the collection, the keys in the order of the documented API, and the success message.
METHODS = {
    611611: ("baseline_vm_samples", VM_KEYS, "'success query vm information'"),
    611711: ("baseline_process_samples", PROCESS_KEYS, "'success query proc information'"),
}
# The valid session ids. A real service would read them from a store, which costs more CPU time.
SESSIONS = {os.environ["BASELINE_SESSION"]}

database = MongoClient(os.environ["BASELINE_MONGODB"]).vmwatch


def application(environ, start_response):
    request = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
    body = json.dumps(answer(request), separators=(",", ":")).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]


def answer(request):
    session, method = request["session_id"], request["method"]
    if session not in SESSIONS:
        status, message, data = 3, "'invalid or expired session'", None
    else:
        collection, keys, message = METHODS[method]
        status, data = 1, rows(collection, keys, request["data"]["instance_id"].rstrip("; "), request["limit"])
    return {
        "status_code": status, "session_id": session, "message_id": "", "message": message, "data": data,
        "method": method,
    }


def rows(collection, keys, instance, limit):
    newest = database[collection].find({"instance_id": instance}).sort([("create_date", -1), ("_id", -1)])
    return [row_text(row, keys) for row in newest.limit(limit)]


def row_text(row, keys):
    """Formats a row like the `repr` of a Python 2 dictionary, with its keys in the given order."""
    return "{" + ", ".join(f"u'{key}': {value_text(row.get(key))}" for key in keys) + "}"


def value_text(value):
    if isinstance(value, str):
        return "u" + ascii(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "None"
    return repr(value)
