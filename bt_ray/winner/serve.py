"""The best program's models behind OpenAI-compatible addresses, for as long as somebody wants them."""

import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from bt_ray.errors import ConfigError
from bt_ray.models import Endpoint
from bt_ray.slot.child import open_port
from bt_ray.slot.slot import Slot, SlotStatus
from bt_ray.weights import Weights
from bt_ray.winner.load import Kept

LOOK_S = 1.0
"""Seconds between two looks at whether the servers are alive."""


class ServingSlot(Protocol):
    """A slot, of this process or elsewhere."""

    def serve(self, weights: Weights) -> Endpoint: ...
    def status(self) -> SlotStatus: ...
    def close(self) -> None: ...


MakeSlot = Callable[[int, Weights, str], ServingSlot]
"""Makes the slot of this number for these weights, whose requests must bear the token."""


@dataclass(frozen=True)
class ServedBest:
    """The models of a program, served.

    Attributes:
        endpoints: Where each is answered.
        token: What requests must bear.
    """

    endpoints: tuple[Endpoint, ...]
    token: str = field(repr=False)
    _slots: tuple[tuple[ServingSlot, Weights], ...]

    def keep_up(self, tell: Callable[[str], None]) -> None:
        """Start a server again that died or hangs; returns never. It is at the same address, unless its node was lost.

        Raises:
            BtRayError: One did not start again.
        """
        while True:
            time.sleep(LOOK_S)
            for slot, weights in self._slots:
                status = slot.status()
                if status.state == "dead":
                    tell(f"The server of {weights.id} is started again: {status.detail}")
                    tell(f"It is at {slot.serve(weights).url}/v1")


@contextmanager
def served_best(kept: Kept, make_slot: MakeSlot, token: str | None = None) -> Iterator[ServedBest]:
    """Serve what the program's predictors ask, one server for each model, until the context ends.

    Args:
        kept: The program.
        make_slot: Makes the slots: `here(...)`, or the cluster's.
        token: What requests must bear; default: a new one.

    Raises:
        ConfigError: The program has no model to serve, or a port is taken.
        BtRayError: A server did not start.
    """
    if not kept.weights:
        raise ConfigError("All models of this program are APIs': there is none to serve.")
    token = token or secrets.token_urlsafe(32)
    with ExitStack() as opened:
        served = tuple(
            (opened.enter_context(closing(make_slot(number, weights, token))), weights)
            for number, weights in enumerate(kept.weights.values())
        )
        yield ServedBest(tuple(slot.serve(weights) for slot, weights in served), token, served)


def here(kept: Kept, *, host: str, port: int) -> MakeSlot:
    """Slots of this process.

    Args:
        kept: The program.
        host: The address to listen on.
        port: The port of the first server; others have the ports after it.
    """

    def make(number: int, weights: Weights, token: str) -> Slot:
        _refuse_taken(host, port + number)
        return Slot(
            f"serve-{number + 1}",
            kept.config.server.of(weights.model),
            token=token,
            host=host,
            storage=kept.storage,
            keeps_records=False,
            port=port + number,
        )

    return make


def _refuse_taken(host: str, port: int) -> None:
    try:
        bound, _ = open_port(host, port)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, socket.gaierror | OSError) else "it is no port"
        raise ConfigError(f"{host}:{port} cannot be listened on ({reason}). Name another with --host and --port.") from None
    bound.close()
