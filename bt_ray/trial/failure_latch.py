"""What remembers lost infrastructure while DSPy forgets it, and tries again what was lost with it."""

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from bt_ray.errors import InfrastructureFailure
from bt_ray.trial.failures import Side, side_of

logger = logging.getLogger(__name__)
Found = TypeVar("Found")


class FailureLatch:
    """Remembers that infrastructure was lost for good, since DSPy forgets exceptions. One for each trial.

    Attributes:
        attempt: Counts what is tried again. Threads that an earlier attempt left behind must not fail a later one, so
            whoever trips the latch says in which attempt it began.
    """

    def __init__(self) -> None:
        self.attempt = 0
        self._lock = threading.Lock()
        self._failure: InfrastructureFailure | None = None

    def trip(self, error: Exception, attempt: int) -> InfrastructureFailure:
        """Remember `error`, if it is of the attempt that is under way, and return the failure to raise."""
        failure = InfrastructureFailure(str(error))
        failure.__cause__ = error
        with self._lock:
            if attempt != self.attempt:
                return failure
            if self._failure is None:
                self._failure = failure
            return self._failure

    def release(self) -> None:
        """Forget what was remembered: another attempt begins."""
        with self._lock:
            self._failure = None
            self.attempt += 1

    def retry(self, compute: Callable[[], Found], retries: int, what: str) -> Found:
        """What `compute` gives, tried again where it fails because infrastructure was lost."""
        for left in range(retries, -1, -1):
            try:
                return compute()
            except (Exception, InfrastructureFailure) as failure:
                if left == 0 or side_of(failure) is not Side.INFRASTRUCTURE:
                    raise
                logger.warning("%s lost its infrastructure and is repeated: %s", what, failure)
                self.release()
        raise AssertionError("the last attempt returns or raises")

    def check(self) -> None:
        """Raises the failure that was remembered, if any."""
        if self._failure is not None:
            raise self._failure
