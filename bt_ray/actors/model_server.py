"""The actor that owns one slot for as long as it lives.

The driver creates it, so it dies with the driver; the model process in it dies with it, however that happens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from bt_ray.config import ServerConfig, TrainConfig
from bt_ray.serving.server import Endpoint
from bt_ray.slot import Slot, SlotStatus
from bt_ray.weights import Weights


@ray.remote(max_restarts=-1, max_concurrency=8)
class ModelServer:
    """`bt_ray.slot.Slot` as an actor. A restarted one is idle: whoever needs weights served asks again."""

    def __init__(self, name: str, config: ServerConfig, token: str, across_nodes: bool, log_dir: str) -> None:
        host = ray.util.get_node_ip_address() if across_nodes else "127.0.0.1"
        self._slot = Slot(name, config, token=token, host=host, log_dir=Path(log_dir))

    def serve(self, weights: Weights) -> Endpoint:
        return self._slot.serve(weights)

    def train(
        self,
        parent: Weights,
        weights_id: str,
        conversations: Sequence[dict[str, Any]],
        config: TrainConfig,
        seed: int,
        output_dir: str,
    ) -> Weights:
        return self._slot.train(parent, weights_id, conversations, config, seed=seed, output_dir=Path(output_dir))

    def stop(self) -> None:
        self._slot.stop()

    def status(self) -> SlotStatus:
        return self._slot.status()
