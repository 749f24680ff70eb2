"""Slots on scripted processes behind the real guard, and how a test asks them."""

from pathlib import Path
from typing import Any

import httpx

from bt_ray.models import Endpoint
from bt_ray.run_dir.storage import Storage, open_storage
from bt_ray.settings.config import ServerConfig, SweepConfig, make_config
from bt_ray.slot.base_models import base_weights
from bt_ray.slot.slot import Slot
from bt_ray.weights import Weights

DATA = [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}]


class Host:
    """A run directory, its settings, and the slots that a test opens on it."""

    def __init__(self, settings: dict[str, Any], folder: Path) -> None:
        self.config: SweepConfig = make_config(settings)
        self.base = base_weights(self.config.model, {})
        self.run_dir = folder / "run"
        self.faults = folder / "faults"
        self.faults.mkdir()
        self.slots: list[Slot] = []

    def slot(self, env: dict[str, str] | None = None, storage: Storage | None = None, **server: Any) -> Slot:
        values = {**self.config.server.model_dump(), **server}
        values["env"] = {**self.config.server.env, "SCRIPTED_FAULTS": str(self.faults), **(env or {})}
        config = ServerConfig.model_validate(values)
        slot = Slot("slot", config, token="token", host="127.0.0.1", storage=storage or open_storage(str(self.run_dir)))
        self.slots.append(slot)
        return slot

    def train(self, slot: Slot, seed: int = 0) -> Weights:
        return slot.train(self.base, DATA, self.config.train, seed=seed)

    def file(self, weights: Weights, name: str = "model.safetensors") -> Path:
        return self.run_dir / weights.path / name


def ask(endpoint: Endpoint, number: int = 4) -> str:
    body = {"model": endpoint.weights_id, "messages": [{"role": "user", "content": f"number {number}"}]}
    url = f"{endpoint.url}/v1/chat/completions"
    answer = httpx.post(url, json=body, headers=endpoint.headers, timeout=120, trust_env=False)
    answer.raise_for_status()
    return str(answer.json()["choices"][0]["message"]["content"]).splitlines()[1]
