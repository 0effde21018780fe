"""A checkpoint on its way to storage, in a thread of its own, watched by the training thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

LOOK_SECONDS = 0.5


class Upload:
    """Runs `work(moved)` in a daemon thread; `work` calls `moved(bytes)` as it gets on.

    Python cannot end a thread that waits for a store, so one that is given up is left behind: it must not report when
    it comes back (`given_up`).
    """

    def __init__(self, step: int, work: Callable[[Upload], None]) -> None:
        self.step, self.bytes, self.given_up = step, 0, False
        self._work, self._error = work, None
        self._done = threading.Event()
        threading.Thread(target=self._run, name=f"checkpoint-{step}", daemon=True).start()

    def moved(self, count: int) -> None:
        """So many bytes more were taken by the store."""
        self.bytes += count

    def wait(self, stall_seconds: float, alive: Callable[[], None]) -> bool:
        """Wait until it has ended (True), or has not moved for `stall_seconds` and is given up (False).

        Calls `alive` whenever it has moved. Raises what `work` raised.
        """
        seen, since = self.bytes, time.monotonic()
        while not self._done.wait(LOOK_SECONDS):
            if self.bytes != seen:
                seen, since = self.bytes, time.monotonic()
                alive()
            elif time.monotonic() - since > stall_seconds:
                self.given_up = True
                return False
        if self._error is not None:
            raise self._error
        return True

    def _run(self) -> None:
        try:
            self._work(self)
        except BaseException as error:  # noqa: BLE001  (handed to the training thread, which raises it)
            self._error = error
        finally:
            self._done.set()
