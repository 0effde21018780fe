"""A headless Chromium, steered through its own protocol (Chrome DevTools Protocol) by aiohttp: open, ask, draw."""

import asyncio
import base64
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LOAD_SECONDS = 30.0


class Page:
    """One tab. `ask` evaluates JavaScript in it and returns the value."""

    def __init__(self, port):
        self._numbers, self._loop = itertools.count(1), asyncio.new_event_loop()
        self._session, self._socket = self._loop.run_until_complete(_connect(port))

    def open(self, url):
        """Go there and wait until it is loaded."""
        self._send("Page.navigate", url=url)
        self.until(f"document.readyState === 'complete' && location.href.startsWith({url!r})")

    def ask(self, expression):
        result = self._send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, condition, seconds=LOAD_SECONDS):
        """Wait until a JavaScript condition holds."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                if self.ask(condition):
                    return
            except (AssertionError, KeyError):
                # The page was exchanged while it was asked.
                pass
            assert time.monotonic() < deadline, (
                f"{condition} never held; the page says {self.ask('document.body.innerText')}"
            )
            time.sleep(0.05)

    def cookie(self, name, value, url):
        self._send("Network.setCookie", name=name, value=value, url=url)

    def dark(self):
        self._send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])

    def draw(self, path, width=1280, height=900):
        """A picture of the window as PNG."""
        self._send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        time.sleep(0.3)
        Path(path).write_bytes(base64.b64decode(self._send("Page.captureScreenshot", format="png")["data"]))

    def close(self):
        self._loop.run_until_complete(self._session.close())
        self._loop.close()

    def _send(self, method, **parameters):
        return self._loop.run_until_complete(self._exchange(method, parameters))

    async def _exchange(self, method, parameters):
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            found = await asyncio.wait_for(self._socket.receive_json(), LOAD_SECONDS)
            if found.get("id") == number:
                assert "error" not in found, found["error"]
                return found["result"]


async def _connect(port):
    """A session and a socket to the first tab; what is set through it (size, colours) lasts as long as it."""
    session = aiohttp.ClientSession()
    async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
        (tab, *_) = [tab for tab in await answer.json() if tab["type"] == "page"]
    return session, await session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0)


@contextmanager
def browser():
    """A Chromium of its own profile; ended with all its processes."""
    with tempfile.TemporaryDirectory(prefix="telar-t-", ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += ["--remote-debugging-port=0", f"--user-data-dir={profile}", "--no-first-run", "--hide-scrollbars"]
        process = subprocess.Popen(
            [*command, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            written = Path(profile) / "DevToolsActivePort"
            deadline = time.monotonic() + LOAD_SECONDS
            while not written.exists() or not written.read_text().strip():
                assert process.poll() is None and time.monotonic() < deadline, "Chromium did not start"
                time.sleep(0.05)
            page = Page(int(written.read_text().split()[0]))
            yield page
            page.close()
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
