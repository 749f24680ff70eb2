"""The contract between those who ask models and those who host them: what is asked, where it is answered, what a refusal is.

The pool of a sweep implements it over Ray (`bt_ray.pool.leased_models`); `bt_ray.load` over one local process
(`bt_ray.winner.local_models`).
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from bt_ray.errors import ServerError
from bt_ray.weights import Weights


@dataclass(frozen=True)
class Endpoint:
    """Where requests for one version of a model are answered, and with which token."""

    url: str
    weights_id: str
    token: str = field(repr=False)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}


Conversation = dict[str, Any]
"""`{"messages": [{"role": ..., "content": ...}, ...]}`; the last message is what to learn."""


REFUSED = "refused"
"""The code in the answers of a server's guard, which tells them from those of the server behind it."""
OTHER_WEIGHTS = 409
"""The HTTP status of the guard's answer to a request for weights that its server does not serve."""


class Models(Protocol):
    """Hosts versions of models, each served on demand."""

    def request(self, weights_id: str) -> AbstractContextManager[Endpoint]:
        """The endpoint for one request: those weights are served, and not replaced while the request is under way.

        Raises:
            InfrastructureError: They could not be served.
        """

    def report_loss(self, endpoint: Endpoint) -> None:
        """Told that a request to `endpoint` failed in a way that speaks of the server; the next request checks it."""

    def report_refusal(self, endpoint: Endpoint) -> None:
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


class TrialModels(Models, Protocol):
    """What a trial needs of its models besides: which are known, how urgent it is, and to let go of them.

    Attributes:
        weights: All weights that are known, by id.
        urgency: How many steps have still to come after the one that leases are for, at most.
    """

    weights: dict[str, Weights]
    urgency: int

    def give_back(self) -> None:
        """Let others use what this trial holds. The next request or training takes it again."""

    def close(self) -> None:
        """Give everything back, for good."""


class NoModels:
    """`TrialModels` where none is served.

    Args:
        reason: What to say to whoever asks for one.
    """

    def __init__(self, reason: str) -> None:
        self._reason = reason
        self.urgency = 0
        self.weights: dict[str, Weights] = {}

    @contextmanager
    def request(self, weights_id: str) -> Iterator[Endpoint]:
        raise ServerError(self._reason)
        yield

    def report_loss(self, endpoint: Endpoint) -> None: ...

    def report_refusal(self, endpoint: Endpoint) -> None: ...

    def kill(self, weights_id: str) -> None: ...

    def add(self, weights: Weights) -> None: ...

    def finetune(self, weights_id: str, conversations: Sequence[Conversation], train_kwargs: dict[str, Any]) -> Weights:
        raise ServerError(self._reason)

    def give_back(self) -> None: ...

    def close(self) -> None: ...
