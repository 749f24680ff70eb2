"""`Models` of servers that somebody else runs: those of `bt-ray serve`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx

from bt_ray.errors import ServerError, TaskError
from bt_ray.models import Conversation, Endpoint
from bt_ray.weights import Weights

ASK_S = 30.0
"""Seconds that a server may take to say what it serves."""


class RemoteModels:
    """Asks given servers, which were found to serve what is needed.

    Args:
        addresses: Their URLs, as `bt-ray serve` prints them.
        token: What it prints beside them.
        needed: The ids of the weights that will be asked for.

    Raises:
        ServerError: A server does not answer, refuses the token, or none serves some of the weights.
    """

    def __init__(self, addresses: Sequence[str], token: str, needed: Sequence[str]) -> None:
        self._endpoints = {
            weights_id: Endpoint(url, weights_id, token)
            for url in (address.rstrip("/").removesuffix("/v1") for address in addresses)
            for weights_id in _serves(url, token)
        }
        if missing := [weights_id for weights_id in needed if weights_id not in self._endpoints]:
            raise ServerError(f"{' and '.join(addresses)} serve {', '.join(self._endpoints)}, not {', '.join(missing)}.")

    @contextmanager
    def request(self, weights_id: str) -> Iterator[Endpoint]:
        yield self._endpoints[weights_id]

    def report_loss(self, endpoint: Endpoint) -> None:
        """Nothing: whoever runs the server starts it again at the same address."""

    def report_refusal(self, endpoint: Endpoint) -> None:
        """Nothing."""

    def kill(self, weights_id: str) -> None:
        """Nothing: the server is not this process's."""

    def add(self, weights: Weights) -> None:
        """Nothing: what can be asked for is known."""

    def finetune(self, weights_id: str, conversations: Sequence[Conversation], train_kwargs: dict[str, Any]) -> Weights:
        raise TaskError("A loaded program is for use. To fine-tune it, run a sweep.")


def _serves(url: str, token: str) -> list[str]:
    """The ids of the weights that a server serves."""
    try:
        headers = {"Authorization": f"Bearer {token}"}
        answer = httpx.get(f"{url}/bt_ray/status", headers=headers, timeout=ASK_S, trust_env=False)
        answer.raise_for_status()
        serving: list[str] = answer.json()["serving"]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError) as error:
        raise ServerError(f"{url} is no server of `bt-ray serve` that takes this token: {error}") from None
    return serving
