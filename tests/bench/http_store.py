"""A store on loopback that is slow and now and then answers 503: a folder over HTTP, with ranges."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CHUNK_BYTES = 1 << 18


class Store:
    """Serves `folder` at `url`, all requests together at most `bytes_per_second`; every `1/failures`-th answers 503."""

    def __init__(self, folder: Path, bytes_per_second: float = 50e6, failures: float = 0.02) -> None:
        self.requests = self.failed = self.sent_bytes = 0
        self._lock = threading.Lock()
        self._every, self._rate, self._free_at = round(1 / failures), bytes_per_second, 0.0
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_GET(self) -> None:
                self._answer(body=True)

            def _answer(self, body: bool) -> None:
                file = folder / self.path.lstrip("/")
                if store._fails():
                    self.send_response(503)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                if not file.is_file() or ".." in self.path:
                    self.send_error(404)
                    return
                size = file.stat().st_size
                start, end, ranged = 0, size, self.headers.get("Range")
                if ranged:
                    first, _, last = ranged.removeprefix("bytes=").partition("-")
                    start = int(first) if first else size - int(last)
                    end = min(size, int(last) + 1) if first and last else size
                self.send_response(206 if ranged else 200)
                self.send_header("Content-Length", str(end - start))
                self.send_header("Accept-Ranges", "bytes")
                self.send_header("ETag", f'"{file.name}-{size}"')
                if ranged:
                    self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
                self.end_headers()
                if body:
                    with file.open("rb") as content:
                        content.seek(start)
                        left = end - start
                        while left > 0 and (piece := content.read(min(left, CHUNK_BYTES))):
                            store._pay(len(piece))
                            self.wfile.write(piece)
                            left -= len(piece)

            def handle(self) -> None:
                try:
                    super().handle()
                except (ConnectionResetError, BrokenPipeError):
                    return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def _fails(self) -> bool:
        with self._lock:
            self.requests += 1
            # The fifth already: a loader that asks for whole files asks only a few times.
            fails = self.requests % self._every == 5 % self._every
            self.failed += fails
            return fails

    def _pay(self, size: int) -> None:
        """Wait until `size` more bytes may go out."""
        with self._lock:
            now = time.monotonic()
            begins = max(now, self._free_at)
            self._free_at = begins + size / self._rate
            self.sent_bytes += size
        time.sleep(max(0.0, begins - now))

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
