"""A client of the documented API, and a bounded load of them, on loopback."""

import http.client
import json
import threading
import time
from collections import Counter
from typing import List, Optional

TIMEOUT = 35.0
CLIENTS = 4
# Between a client's requests: a steady load, not a race for the cores.
PAUSE = 0.005
# A rolling restart takes a minute; a load that is forgotten ends by itself.
LONGEST = 300.0


class Api:
    """Keeps a connection; asks the next gateway where one refuses it."""

    def __init__(self, addresses: List[str]):
        self.addresses = list(addresses)
        self.connection: Optional[http.client.HTTPConnection] = None
        self.moved = 0

    def ask(self, request: dict) -> dict:
        """The answer; a connection that one gateway does not take or keep is tried once at each other."""
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
                self.moved += 1
                self.addresses.append(self.addresses.pop(0))
        raise AssertionError("the last attempt returns or raises")

    def login(self, user: str, password: str) -> Optional[str]:
        answer = self.ask({"method": 458753, "data": {"user_name": user, "password": password}})
        return answer["session_id"] if answer["status_code"] == 1 else None

    def login_within(self, seconds: float, user: str, password: str) -> Optional[str]:
        """A session as soon as there is one."""
        end = time.monotonic() + seconds
        while True:
            session = self.login(user, password)
            if session or time.monotonic() > end:
                return session
            time.sleep(0.5)

    def rows(self, session: str, method: int, instance: str, more: dict) -> list:
        request = {"method": method, "session_id": session, "limit": 5, "data": {"instance_id": instance}, **more}
        return self.ask(request)["data"] or []

    def rows_within(self, seconds: float, *arguments) -> list:
        """Rows as soon as there are some."""
        end = time.monotonic() + seconds
        while True:
            rows = self.rows(*arguments)
            if rows or time.monotonic() > end:
                return rows
            time.sleep(0.2)


class Load:
    """Clients that ask until they are told to stop, and count."""

    def __init__(self, addresses: List[str], password: str, instance: str, machine: str):
        self.addresses, self.password, self.instance, self.machine = addresses, password, instance, machine
        self.asked, self.moved = 0, 0
        self.failures = Counter()
        self.slowest = 0.0
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

    def told(self) -> str:
        failed = f"{sum(self.failures.values())} of {self.asked} requests failed"
        return f"{failed} {dict(self.failures) or ''}".rstrip() + f", the slowest took {self.slowest:.2f} s"

    def _client(self, number: int) -> None:
        # Clients begin at different gateways.
        turn = number % len(self.addresses)
        api = Api(self.addresses[turn:] + self.addresses[:turn])
        session = api.login("admin", self.password)
        end = time.monotonic() + LONGEST
        count = 0
        while not self._stop.is_set() and time.monotonic() < end:
            # Of 50 requests one is a login, which costs a password hash, and five start a VM.
            kind = count % 50
            if kind == 0:
                request = {"method": 458753, "data": {"user_name": "admin", "password": self.password}}
            elif kind % 10 == 5:
                request = {"method": 32523, "session_id": session, "data": {"instance_id": self.machine}}
            else:
                request = {"method": 611611, "session_id": session, "limit": 2, "data": {"instance_id": self.instance}}
            # The newest session of a client is its own: a user's oldest ones end beyond VMWATCH_SESSIONS_PER_USER.
            session = self._count(api, request) or session
            count += 1
            time.sleep(PAUSE)
        with self._lock:
            self.moved += api.moved

    def _count(self, api: Api, request: dict) -> Optional[str]:
        """Asks, and counts; the session that the answer names, if any."""
        began, answer = time.monotonic(), {}
        try:
            answer = api.ask(request)
            failure = "" if answer["status_code"] == 1 else f"{request['method']}: {answer['http']} {answer['message']}"
        except (OSError, http.client.HTTPException) as error:
            failure = f"{request['method']}: {type(error).__name__}: {error}"
        with self._lock:
            self.asked += 1
            self.slowest = max(self.slowest, time.monotonic() - began)
            if failure:
                self.failures[failure] += 1
        return None if failure else answer.get("session_id")
