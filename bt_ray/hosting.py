"""What the DSPy side asks of whoever hosts models: the one protocol between `lm` and the slots.

The pool of a sweep implements it over Ray (`bt_ray.actors.leased_models`); `bt_ray.load` over one local process
(`bt_ray.local_models`).
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeVar

from bt_ray.errors import InfrastructureFailure, ServerError
from bt_ray.failures import Side, side_of
from bt_ray.serving.server import Endpoint
from bt_ray.weights import Weights

logger = logging.getLogger(__name__)
Found = TypeVar("Found")
Conversation = dict[str, Any]
"""`{"messages": [{"role": ..., "content": ...}, ...]}`; the last message is what to learn."""


class Models(Protocol):
    """Hosts versions of models, each served on demand."""

    def request(self, weights_id: str) -> AbstractContextManager[Endpoint]:
        """The endpoint for one request: those weights are served, and not replaced while the request is under way.

        Raises:
            InfrastructureError: They could not be served.
        """

    def lost(self, endpoint: Endpoint) -> None:
        """Told that a request to `endpoint` failed in a way that speaks of the server; the next request checks it."""

    def refused(self, endpoint: Endpoint) -> None:
        """Told that `endpoint` refused a request, because it went to other weights; the next request asks anew."""

    def finetune(self, weights_id: str, conversations: Sequence[Conversation], train_kwargs: dict[str, Any]) -> Weights:
        """Train new weights from `weights_id`.

        Raises:
            InfrastructureError: The training was lost.
        """

    def kill(self, weights_id: str) -> None:
        """The weights are not needed for now; requests may still come."""

    def add(self, weights: Weights) -> None:
        """Make weights known that were trained before."""


class NoModels:
    """`Models` where none is served.

    Args:
        reason: What to say to whoever asks for one.
    """

    urgency = 0

    def __init__(self, reason: str) -> None:
        self._reason = reason
        self.weights: dict[str, Weights] = {}

    @contextmanager
    def request(self, weights_id: str) -> Iterator[Endpoint]:
        raise ServerError(self._reason)
        yield

    def lost(self, endpoint: Endpoint) -> None: ...

    def refused(self, endpoint: Endpoint) -> None: ...

    def kill(self, weights_id: str) -> None: ...

    def add(self, weights: Weights) -> None: ...

    def finetune(self, weights_id: str, conversations: Sequence[Conversation], train_kwargs: dict[str, Any]) -> Weights:
        raise ServerError(self._reason)

    def give_back(self) -> None: ...

    def close(self) -> None: ...


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

    def retried(self, compute: Callable[[], Found], retries: int, what: str) -> Found:
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
