"""The actor that owns one slot for as long as it lives.

Who creates it, a sweep's pool or whoever serves the winner, takes it along in dying; the model process in it dies with it,
however that happens.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from huggingface_hub import get_token

from bt_ray.models import Endpoint
from bt_ray.run_dir.storage import open_storage
from bt_ray.settings.config import ServerConfig, TrainConfig
from bt_ray.slot.slot import Change, Slot, SlotStatus
from bt_ray.weights import Weights


@dataclass(frozen=True)
class Served:
    """How a server came to serve what it was asked to.

    Attributes:
        endpoint: Where requests are answered.
        change: What it took.
    """

    endpoint: Endpoint
    change: Change


def actor_options(config: ServerConfig) -> dict[str, Any]:
    """What a slot takes of its node, as Ray has it."""
    return {"num_cpus": config.cpus, "num_gpus": config.gpus, "accelerator_type": config.accelerator_type}


@ray.remote(max_restarts=0, max_concurrency=8)
class ModelServer:
    """`bt_ray.slot.Slot` as an actor. One that died is replaced by another, not started again."""

    def __init__(
        self,
        name: str,
        config: ServerConfig,
        token: str,
        across_nodes: bool,
        run_dir: str,
        *,
        hub_token: str | None = None,
        keeps_records: bool = True,
        port: int = 0,
    ) -> None:
        if hub_token is not None and get_token() is None:  # a node's own goes first
            os.environ["HF_TOKEN"] = hub_token  # the processes of the slot inherit it
        host = ray.util.get_node_ip_address() if across_nodes else "127.0.0.1"
        storage = open_storage(run_dir)
        self._slot = Slot(name, config, token=token, host=host, storage=storage, keeps_records=keeps_records, port=port)

    def node(self) -> str:
        """The id of its node."""
        return str(ray.get_runtime_context().get_node_id())

    def serve(self, weights: Weights, beside: Sequence[Weights]) -> Served:
        return Served(self._slot.serve(weights, beside), self._slot.change)

    def fetch(self, weights: Weights) -> None:
        self._slot.fetch(weights)

    def train(self, parent: Weights, conversations: Sequence[dict[str, Any]], config: TrainConfig, seed: int) -> Weights:
        return self._slot.train(parent, conversations, config, seed=seed)

    def stop(self) -> None:
        self._slot.stop()

    def close(self) -> None:
        self._slot.close()

    def status(self) -> SlotStatus:
        return self._slot.status()
