"""Serves a run's status page from the controller's process on the head: read only, with the cluster's token.

Who is logged in to Ray's dashboard is logged in here: the same cookie counts. Without a token in its environment (a
cluster whose authentication is off) the page is served on 127.0.0.1 only, to requests that name this host.
"""

from __future__ import annotations

import hmac
import json
import logging
import threading
import time
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import parse_qs

import ray
from ray._private import ray_constants
from ray.dashboard.modules.job.common import JobInfoStorageClient
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from cluster.authentication import COOKIE, ray_token
from cluster.storage import Storage
from configs.errors import TelarError
from jobs.ledger import Ledger
from jobs.run_reader import RunReader
from jobs.run_view import RunView
from jobs.status_page import page, token_form

LOOPBACK = "127.0.0.1"
LOOPBACK_NAMES = {LOOPBACK, "localhost"}
# Requests within this time get the same view: storage is read once.
KEPT_SECONDS = 1.0
FORM_BYTES = 4096
METADATA_KEY = "status_page"


class StatusServer:
    """One run's page on a port of its own; `url` is its address."""

    def __init__(self, storage: Storage, run: str, host: str, token: str | None) -> None:
        """Raises TelarError when `host` is not loopback and there is no token: the page would be open to all."""
        if token is None and host != LOOPBACK:
            raise TelarError(
                "tracking.status_page: cluster needs a cluster with token authentication (RAY_AUTH_MODE=token on every "
                "node); set it, or tracking.status_page to loopback"
            )
        self._reader, self._run, self._token = RunReader(storage, run), run, token
        self._lock = threading.Lock()
        self._seen: tuple[float, RunView] | None = None
        self._http = ThreadingHTTPServer((host, 0), _handler(self))
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, args=(0.1,), name="status-page", daemon=True).start()
        self.url = f"http://{host}:{self._http.server_address[1]}"

    def look(self) -> RunView:
        """The run as it was within the last second."""
        with self._lock:
            if self._seen is None or time.monotonic() - self._seen[0] > KEPT_SECONDS:
                self._seen = (time.monotonic(), self._reader.look(time.time()))
            return self._seen[1]

    @property
    def run(self) -> str:
        """The run's name."""
        return self._run

    @property
    def token(self) -> str | None:
        """What a request must bring, if anything."""
        return self._token

    def close(self) -> None:
        """Stop listening."""
        self._http.shutdown()
        self._http.server_close()


def serve(kind: Literal["loopback", "cluster"], storage: Storage, ledger: Ledger, job_id: str) -> StatusServer:
    """Start the page of the ledger's run, and write its address to status.json and to the Ray job's metadata."""
    run = ledger.status["run"]
    host = LOOPBACK if kind == "loopback" else ray.util.get_node_ip_address()
    server = StatusServer(storage, run, host, ray_token())
    ledger.update(status_page_url=server.url)
    tell_job(job_id, METADATA_KEY, server.url)
    return server


def tell_job(job_id: str, key: str, value: str) -> bool:
    """Add an entry to the metadata of a running Ray job; False where the Jobs API does not know it.

    The Jobs API takes metadata at submission only, when the port is not known yet. Ray writes the record when a job
    changes its state, which it does not while its entrypoint starts the controller.
    """
    name = JobInfoStorageClient.JOB_DATA_KEY.format(job_id=job_id).encode()
    found = _internal_kv_get(name, namespace=ray_constants.KV_NAMESPACE_JOB)
    if found is None:
        return False
    record = json.loads(found)
    record["metadata"] = {**(record.get("metadata") or {}), key: value}
    _internal_kv_put(name, json.dumps(record).encode(), overwrite=True, namespace=ray_constants.KV_NAMESPACE_JOB)
    return True


def _handler(server: StatusServer) -> type[BaseHTTPRequestHandler]:
    """The handler class of one server."""

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "Telar", ""

        def do_GET(self) -> None:
            """The page; any other path is absent."""
            if not self._may_read():
                self._answer(HTTPStatus.UNAUTHORIZED, token_form(server.run, refused=False))
            elif self.path == "/":
                self._answer(HTTPStatus.OK, page(server.look()))
            else:
                self._answer(HTTPStatus.NOT_FOUND, "nothing here", "text/plain")

        def do_POST(self) -> None:
            """A token from the form becomes a cookie."""
            length = self.headers.get("Content-Length", "")
            if self.path != "/token" or server.token is None or not length.isdigit() or int(length) > FORM_BYTES:
                self.close_connection = True
                self._answer(HTTPStatus.BAD_REQUEST, "nothing can be changed here", "text/plain")
                return
            (given,) = parse_qs(self.rfile.read(int(length)).decode(errors="replace")).get("token", [""])[:1]
            if not _same(given.strip(), server.token):
                self._answer(HTTPStatus.UNAUTHORIZED, token_form(server.run, refused=True))
                return
            self.send_response(HTTPStatus.SEE_OTHER)
            self.send_header("Location", "/")
            self.send_header("Set-Cookie", f"{COOKIE}={server.token}; Path=/; HttpOnly; SameSite=Strict")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _may_read(self) -> bool:
            if server.token is None:
                # Another name for this address is how pages of other sites reach local servers (DNS rebinding).
                return self.headers.get("Host", "").rpartition(":")[0] in LOOPBACK_NAMES
            scheme, _, given = self.headers.get("Authorization", "").partition(" ")
            if scheme.lower() == "bearer" and _same(given.strip(), server.token):
                return True
            try:
                cookie = SimpleCookie(self.headers.get("Cookie", "")).get(COOKIE)
            except CookieError:
                return False
            return cookie is not None and _same(cookie.value, server.token)

        def _answer(self, status: HTTPStatus, text: str, kind: str = "text/html") -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Referrer-Policy", "no-referrer")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Requests are no news in the controller's log."""
            logging.debug(format, *arguments)

    return Handler


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())
