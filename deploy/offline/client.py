"""A client of the documented API on loopback, and a load generator with a fixed number of clients."""

import http.client
import json
import threading
import time
from collections import Counter
from datetime import datetime, timezone
from typing import Dict, List, Optional

TIMEOUT = 35.0
CLIENTS = 4
# Pause of a client between requests, in seconds. The load is steady and leaves the CPU cores to the services.
PAUSE = 0.005
# Interval between the logins of a client, in seconds. All clients share one address, and a gateway allows one login per
# second from an address (VMWATCH_LOGIN_INTERVAL).
LOGIN_INTERVAL = 5.0
# Time limit of the load in seconds; a rolling restart takes up to a minute.
LONGEST = 300.0


class Api:
    """A client that keeps one connection open. If a gateway refuses or closes it, the request is sent to the next gateway."""

    def __init__(self, addresses: List[str]):
        self.addresses = list(addresses)
        self.connection: Optional[http.client.HTTPConnection] = None
        self.retried = 0

    def ask(self, request: dict) -> dict:
        """Sends a request and returns the answer. After a connection error it tries each other gateway once."""
        body = json.dumps(request)
        for attempt in range(len(self.addresses) + 1):
            try:
                if not self.connection:
                    self.connection = http.client.HTTPConnection(self.addresses[0], timeout=TIMEOUT)
                self.connection.request("POST", "/wsgi_app.py", body, {"Content-Type": "application/x-www-form-urlencoded"})
                answer = self.connection.getresponse()
                text = answer.read()
                if answer.getheader("Connection") == "close":
                    self.connection = None
                return {"http": answer.status, **json.loads(text)}
            except (OSError, http.client.HTTPException):
                self.connection = None
                if attempt == len(self.addresses):
                    raise
                self.retried += 1
                self.addresses.append(self.addresses.pop(0))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def login(self, user: str, password: str) -> Optional[str]:
        answer = self.ask({"method": 458753, "data": {"user_name": user, "password": password}})
        return answer["session_id"] if answer["status_code"] == 1 else None

    def login_within(self, seconds: float, user: str, password: str) -> Optional[str]:
        """Tries to log in once per second until it succeeds; returns `None` after the given number of seconds."""
        end = time.monotonic() + seconds
        while True:
            session = self.login(user, password)
            if session or time.monotonic() > end:
                return session
            time.sleep(1.0)

    def rows(self, session: str, method: int, instance: str, more: dict) -> list:
        request = {"method": method, "session_id": session, "limit": 5, "data": {"instance_id": instance}, **more}
        return self.ask(request)["data"] or []

    def rows_within(self, seconds: float, *arguments) -> list:
        """Polls until rows exist and returns them; returns an empty list after the given number of seconds."""
        end = time.monotonic() + seconds
        while True:
            rows = self.rows(*arguments)
            if rows or time.monotonic() > end:
                return rows
            time.sleep(0.2)


class Load:
    """Runs clients that send requests until the `with` block ends, and counts failures."""

    def __init__(self, addresses: List[str], password: str, instance: str, machine: str):
        self.addresses, self.password, self.instance, self.machine = addresses, password, instance, machine
        self.requests, self.retried = 0, 0
        self.failures = Counter()
        # When the first failed request of each kind was sent, so the cause can be found in the logs.
        self.first_failures: Dict[str, str] = {}
        self.slowest = 0.0
        self._began = time.monotonic()
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._client, args=(number,)) for number in range(CLIENTS)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def summary(self) -> str:
        kinds = [f"{count} x {what}, first at {self.first_failures[what]}" for what, count in self.failures.items()]
        failed = f"{sum(self.failures.values())} of {self.requests} requests failed"
        return failed + (f" ({'; '.join(kinds)})" if kinds else "") + f", the slowest took {self.slowest:.2f} s"

    def _client(self, number: int) -> None:
        # Each client starts with a different gateway.
        turn = number % len(self.addresses)
        api = Api(self.addresses[turn:] + self.addresses[:turn])
        session, count = None, 0
        # Each client logs in at its start and then regularly; the logins of all clients are spread evenly over time.
        next_login = self._began
        while not self._stop.is_set() and time.monotonic() < self._began + LONGEST:
            if time.monotonic() >= next_login:
                request = {"method": 458753, "data": {"user_name": "admin", "password": self.password}}
                first = not session
                next_login += LOGIN_INTERVAL * (1 + number / CLIENTS if first else 1)
            elif count % 10 == 5:
                request = {"method": 32523, "session_id": session, "data": {"instance_id": self.machine}}
            else:
                request = {"method": 611611, "session_id": session, "limit": 2, "data": {"instance_id": self.instance}}
            # A client always uses its newest session, because a user's oldest sessions end when there are more than
            # VMWATCH_SESSIONS_PER_USER.
            session = self._send(api, request) or session
            count += 1
            time.sleep(PAUSE)
        with self._lock:
            self.retried += api.retried

    def _send(self, api: Api, request: dict) -> Optional[str]:
        """Sends a request and counts it. Returns the session token in the answer, if there is one."""
        sent, began, answer = datetime.now(timezone.utc), time.monotonic(), {}
        try:
            answer = api.ask(request)
            failure = "" if answer["status_code"] == 1 else f"{request['method']}: {answer['http']} {answer['message']}"
        except (OSError, http.client.HTTPException) as error:
            failure = f"{request['method']}: {type(error).__name__}: {error}"
        with self._lock:
            self.requests += 1
            self.slowest = max(self.slowest, time.monotonic() - began)
            if failure:
                self.failures[failure] += 1
                self.first_failures.setdefault(failure, f"{sent:%H:%M:%S.%f} UTC")
        return None if failure else answer.get("session_id")
