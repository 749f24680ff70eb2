"""A slot on whatever node of the cluster has room for it."""

import contextlib
from collections.abc import Callable
from typing import Any

import ray
from huggingface_hub import get_token
from ray.actor import ActorHandle

from bt_ray.errors import ResourcesError, ServerError
from bt_ray.models import Endpoint
from bt_ray.pool.calls import ActorGone, ask
from bt_ray.pool.model_server import ModelServer, Served, actor_options
from bt_ray.pool.nodes import NEWS_S, free_resources, node_resources
from bt_ray.pool.resources import too_large
from bt_ray.settings.config import ServerConfig, SweepConfig
from bt_ray.slot.slot import SlotStatus
from bt_ray.weights import Weights

STATUS_S = 30.0


class RemoteSlot:
    """Serves like a slot of this process, in an actor that is made with the first use, and again if its node is lost.

    Args:
        name: Its name in logs.
        config: The server's settings, of which its resources.
        token: What requests must bear.
        run_dir: Where the weights are.
        port: On the node; 0: a free one.
        tell: Told while the cluster has no room.
    """

    def __init__(
        self, name: str, config: ServerConfig, *, token: str, run_dir: str, port: int, tell: Callable[[str], None]
    ) -> None:
        self._name, self._config, self._token = name, config, token
        self._run_dir, self._port, self._tell = run_dir, port, tell
        self._actor: ActorHandle[Any] | None = None

    def serve(self, weights: Weights) -> Endpoint:
        """Serve `weights`, and return where; waits for room on the cluster.

        Raises:
            BtRayError: The server did not start.
        """
        if self._actor is None:
            self._actor = self._place_actor()
        served: Served = ask(self._actor.serve, weights, ())
        return served.endpoint

    def status(self) -> SlotStatus:
        if self._actor is None:
            return SlotStatus(state="dead", detail="its actor was lost")
        try:
            status: SlotStatus = ask(self._actor.status, timeout_s=STATUS_S)
        except ActorGone as lost:
            self._actor = None
            return SlotStatus(state="dead", detail=str(lost))
        except ServerError:
            return SlotStatus(state="serving")  # it is busy, or its node is: Ray says when that is lost
        return status

    def close(self) -> None:
        if self._actor is not None:
            with contextlib.suppress(Exception):  # the connection may be gone, and with it the actor
                ray.wait([self._actor.close.remote()], timeout=30)
                ray.kill(self._actor)

    def _place_actor(self) -> "ActorHandle[Any]":
        actor = ModelServer.options(**actor_options(self._config)).remote(  # type: ignore[attr-defined]
            self._name,
            self._config,
            self._token,
            True,
            self._run_dir,
            hub_token=get_token(),
            keeps_records=False,
            port=self._port,
        )
        ready = actor.__ray_ready__.remote()
        while not ray.wait([ready], timeout=NEWS_S)[0]:
            self._tell(f"Waiting for a node with {self._config.needs}; free now: {free_resources()}")
        return actor


def on_cluster(
    config: SweepConfig, run_dir: str, port: int, tell: Callable[[str], None]
) -> Callable[[int, Weights, str], RemoteSlot]:
    """Makes slots on the cluster, for `bt_ray.winner.serve.served_best`.

    What it gives raises `ResourcesError` where no node of the cluster is large enough.

    Args:
        config: The sweep's settings.
        run_dir: Where the weights are.
        port: Of the first server; others have the ports after it. 0: free ones.
        tell: Told while there is no room.
    """

    def make(number: int, weights: Weights, token: str) -> RemoteSlot:
        server = config.server.of(weights.model)
        if not config.autoscaling and (missing := too_large(server, node_resources())) is not None:
            raise ResourcesError(missing)
        its_port = port + number if port else 0
        return RemoteSlot(f"serve-{number + 1}", server, token=token, run_dir=run_dir, port=its_port, tell=tell)

    return make
