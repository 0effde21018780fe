"""Something handed over in a thread of its own, while the training thread goes on until it has to be sure."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Delivery:
    """Runs `work` in a daemon thread: a process that ends does not wait for a node that no longer answers."""

    def __init__(self, name: str, work: Callable[[], None]) -> None:
        self._work = work
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until it is done; raises what `work` raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001  (handed to the training thread, which raises it)
            self._error = error
