"""What the DSPy side asks of whoever hosts models: the one protocol between `lm` and the slots.

The pool of a sweep implements it over Ray (`bt_ray.actors.leased_models`); `bt_ray.load` over one local process
(`bt_ray.local_models`).
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from bt_ray.errors import ServerError
from bt_ray.serving.server import Endpoint
from bt_ray.weights import Weights

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
