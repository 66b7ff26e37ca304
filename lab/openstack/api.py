"""The cloud's APIs over plain HTTP, as the administrator of project admin."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, NamedTuple

from lab.deadline import wait_until
from lab.errors import LabError
from lab.namespace import Namespace
from lab.openstack.settings import PASSWORD, PORTS, URLS

ANSWER_SECONDS = 120.0
POLL_SECONDS = 0.3
VERSIONS = {"image": "/v2", "network": "/v2.0"}
"""What has to be said in a path, where the catalogue does not."""
NO_ANSWER = 0
PASSING = {NO_ANSWER, 401, 500, 502, 503}
"""What services answer while they start, or while another one restarts."""


class Refused(LabError):
    """An API answered with an error; `status` is HTTP's, NO_ANSWER where nobody answered."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(f"HTTP {status}: {words}")
        self.status = status


class Answer(NamedTuple):
    """What came, decoded, None where it was empty; and the id of the request."""

    body: Any
    request_id: str


class Cloud:
    """The APIs, as reached from a namespace. Threads may share it."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        self._token: str | None = None

    def get(self, service: str, path: str, version: str | None = None) -> Any:
        """The body of what is at a path of a service ("compute", "network", ...). Raises Refused."""
        return self.call(service, "GET", path, version=version).body

    def post(self, service: str, path: str, body: Any, version: str | None = None) -> Any:
        """The body of the answer. Raises Refused."""
        return self.call(service, "POST", path, body, version).body

    def call(
        self, service: str, method: str, path: str, body: Any = None, version: str | None = None, octets: bytes = b""
    ) -> Answer:
        """One request; a body goes as JSON, octets as they are. `version` is the API's microversion. Raises Refused."""
        if self._token is None:
            self._token = self._log_in()
        headers = {"X-Auth-Token": self._token, "Accept": "application/json"}
        if version is not None:
            headers["OpenStack-API-Version"] = f"{service} {version}"
        data = octets or (None if body is None else json.dumps(body).encode())
        if data is not None:
            headers["Content-Type"] = "application/octet-stream" if octets else "application/json"
        url = URLS[service] + VERSIONS.get(service, "") + path
        heard, said = self._ask(urllib.request.Request(url, data, headers, method=method))
        return Answer(json.loads(said) if said else None, heard.get("x-openstack-request-id", ""))

    def find(self, service: str, path: str, kind: str, name: str) -> Any:
        """The first of the things at a path that is called so, or None. `kind` is their name in the answer."""
        return next((thing for thing in self.get(service, path)[kind] if thing["name"] == name), None)

    def ensure(self, service: str, path: str, kinds: str, kind: str, body: dict[str, Any]) -> Any:
        """The thing that is called body["name"], made if there is none."""
        found = self.find(service, path, kinds, body["name"])
        return found or self.post(service, path, {kind: body})[kind]

    def answers(self, service: str) -> bool:
        """Whether somebody speaks HTTP at the service's port; what he says does not matter."""
        url = f"{URLS['identity'].rpartition(':')[0]}:{PORTS[service]}/"
        try:
            self._ask(urllib.request.Request(url), 5.0)
        except Refused as error:
            return error.status != NO_ANSWER
        return True

    def _log_in(self) -> str:
        domain = {"id": "default"}
        user = {"name": "admin", "domain": domain, "password": PASSWORD}
        scope = {"project": {"name": "admin", "domain": domain}}
        body = {"auth": {"identity": {"methods": ["password"], "password": {"user": user}}, "scope": scope}}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(URLS["identity"] + "/auth/tokens", json.dumps(body).encode(), headers)
        return self._ask(request)[0]["X-Subject-Token"]

    def _ask(self, request: urllib.request.Request, seconds: float = ANSWER_SECONDS) -> tuple[Any, bytes]:
        try:
            with self._namespace.inside(), urllib.request.urlopen(request, timeout=seconds) as answer:
                return answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            raise Refused(error.code, error.read().decode(errors="replace")[:500]) from error
        except OSError as error:
            raise Refused(NO_ANSWER, str(error)) from error


def wait_for(condition: Callable[[], object], what: str, seconds: float) -> None:
    """As `lab.deadline.wait_until`, for conditions that ask an API: what passes while services start is no failure."""

    def holds() -> object:
        try:
            return condition()
        except Refused as error:
            if error.status not in PASSING:
                raise
            return False

    wait_until(holds, what, seconds, poll_seconds=POLL_SECONDS)
