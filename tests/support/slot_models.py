"""`Models` on one slot of the test's own process: real child processes, no Ray."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bt_ray.models import Conversation
from bt_ray.run_dir.storage import open_storage
from bt_ray.settings.config import SweepConfig, override_train
from bt_ray.slot.base_models import base_weights
from bt_ray.trial.failure_latch import FailureLatch
from bt_ray.trial.lm import ServedEngine, ServedLM, make_served_lm
from bt_ray.weights import Weights
from bt_ray.winner.local_models import LocalModels


class SlotModels(LocalModels):
    """`LocalModels` that can fine-tune."""

    def __init__(self, config: SweepConfig, work_dir: Path) -> None:
        self.base = base_weights(config.model, config.server.engine_options)
        super().__init__({self.base.id: self.base}, config.server, open_storage(str(work_dir)))
        self._config = config
        self.work_dir = work_dir

    def finetune(self, weights_id: str, conversations: Sequence[Conversation], train_kwargs: dict[str, Any]) -> Weights:
        parent = self._weights[weights_id]
        train = override_train(self._config.train, train_kwargs)
        server = self.server(parent)
        trained = server.slot.train(parent, conversations, train, seed=self._config.seed)
        server.forget()
        self._weights[trained.id] = trained
        return trained

    def lm(self) -> ServedLM:
        engine = ServedEngine(self, FailureLatch(), retries=1, timeout_s=30, max_connections=100)
        return make_served_lm(self.base, engine, self._config.lm)
