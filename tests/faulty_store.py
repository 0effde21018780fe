"""A real HTTP store on the loopback that serves a folder, misbehaves as told, and counts what it served."""

import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PIECE_BYTES = 1 << 14


@dataclass
class Faults:
    """What happens to requests, by file name (the last part of the path).

    `answers`: taken one per request, in turn: an HTTP status, "stall" (headers, half of the content, then nothing
    until the store closes), "silent" (no answer at all), "cut" (the connection ends half way), "short" (half of the
    content as if it were all), "flip" (one bit is wrong), "fine". "*" holds for files without an entry. `always`
    likewise, for every request.
    `flipped`: byte to flip, by file name. `bytes_per_second`: for all connections together, 0 is unlimited.
    """

    answers: dict[str, deque] = field(default_factory=dict)
    always: dict[str, object] = field(default_factory=dict)
    flipped: dict[str, int] = field(default_factory=dict)
    bytes_per_second: float = 0.0


class FaultyStore:
    """`with FaultyStore(folder) as store: ... store.url`; `requests`, `bytes` and `whole` count by file name."""

    def __init__(self, folder):
        self.folder, self.faults = Path(folder), Faults()
        self.requests, self.bytes, self.whole = Counter(), Counter(), Counter()
        self._lock, self._pace = threading.Lock(), threading.Lock()
        self.closing = threading.Event()
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                store.serve(self)

            def do_HEAD(self):
                store.serve(self, head=True)

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_):
                """Clients that give up half way are the point of this store."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def serve(self, handler, head=False):
        path = self.folder / handler.path.lstrip("/")
        if not path.is_file():
            handler.send_error(404)
            return
        name = path.name
        answer = self._answer(name, head)
        if isinstance(answer, int):
            handler.send_error(answer)
            return
        if answer == "silent":
            self.closing.wait()
            handler.close_connection = True
            return
        content = bytearray(path.read_bytes())
        if name in self.faults.flipped:
            content[self.faults.flipped[name]] ^= 16
        half = len(content) // 2
        if answer == "flip":
            content[half] ^= 16
        if answer == "short":
            content = content[:half]
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        if head:
            return
        sent = content[:half] if answer in ("stall", "cut") else content
        for start in range(0, len(sent), PIECE_BYTES):
            piece = bytes(sent[start : start + PIECE_BYTES])
            if self.faults.bytes_per_second:
                with self._pace:
                    time.sleep(len(piece) / self.faults.bytes_per_second)
            handler.wfile.write(piece)
            with self._lock:
                self.bytes[name] += len(piece)
        handler.wfile.flush()
        if answer == "stall":
            self.closing.wait()
        if answer in ("stall", "cut"):
            handler.close_connection = True
            return
        with self._lock:
            self.whole[name] += 1

    def _answer(self, name, head):
        with self._lock:
            if not head:
                self.requests[name] += 1
            waiting = self.faults.answers.get(name, self.faults.answers.get("*"))
            if waiting:
                return waiting.popleft()
            return self.faults.always.get(name, self.faults.always.get("*"))
