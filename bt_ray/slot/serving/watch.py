"""Finds out that a server is dead, or hangs: its health route answers, or not even that, and no token comes."""

import logging
import threading
import time

from bt_ray.errors import ServerError
from bt_ray.slot.serving.server import ServerProcess

LOOK_S = 2.0
logger = logging.getLogger(__name__)


class Watch:
    """Looks at a server every few seconds, from a thread of its own, and ends it when it hangs.

    Whoever waits for the server's answers then sees the connection closed, and asks elsewhere.

    Args:
        server: The server.
        stall_s: Seconds without an answer, while requests are under way, after which the engine is asked for a token; and
            that this, or an answer to anything, may take.

    Attributes:
        reason: Why the server is dead, with its last log lines; empty while it is not.
    """

    def __init__(self, server: ServerProcess, stall_s: float) -> None:
        self.reason = ""
        self._server = server
        self._stall_s = stall_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"watch-{server.pid}", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Look no more."""
        self._ended.set()

    def _run(self) -> None:
        answered, since = 0, time.monotonic()
        while not self._ended.wait(min(LOOK_S, self._stall_s / 2)):
            if not self._server.alive:
                self._give_up(self._server.end)
                return
            try:
                under_way, now_answered = self._server.under_way(self._stall_s)
                if under_way == 0 or now_answered != answered:
                    answered, since = now_answered, time.monotonic()
                elif time.monotonic() - since >= self._stall_s:
                    self._server.probe(self._stall_s)
                    since = time.monotonic()
            except ServerError as error:
                self._give_up(self._server.failure(error))
                return

    def _give_up(self, reason: str) -> None:
        if not self._ended.is_set():
            self.reason = reason
            logger.warning("The server of %s is dead. %s", self._server.weights.id, reason)
            self._server.stop()
