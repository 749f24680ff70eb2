"""What the pool tells whoever asked for a lease."""

from dataclasses import dataclass
from typing import Any

from ray.actor import ActorHandle

from bt_ray.models import Endpoint
from bt_ray.weights import Weights

Returned = dict[int, Weights | None]
"""The numbers of leases that are given back, and what the training made that each was for."""


@dataclass(frozen=True)
class Lease:
    """A trial's right to use a model server, from now on.

    Attributes:
        number: Names it; never used for two leases.
        server: The server's number.
        incarnation: Tells what the server is now from what it was before it was lost.
        endpoint: Where requests for the lease's weights are answered; None for a training.
        actor: The server's actor, which trains.
    """

    number: int
    server: int
    incarnation: int
    endpoint: Endpoint | None
    actor: "ActorHandle[Any]"


@dataclass(frozen=True)
class ServerView:
    """What a server does now, for whoever watches.

    Attributes:
        server: Its number.
        state: `"placing"`, or as in `bt_ray.slot.SlotStatus`.
        weights_id: Of the weights served, or in training.
        holders: Who has leases on it.
        detail: Progress of a training.
    """

    server: int
    state: str
    weights_id: str | None
    holders: tuple[str, ...]
    detail: str
