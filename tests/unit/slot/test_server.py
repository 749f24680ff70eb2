"""The environment that a vLLM process is started in."""

from pathlib import Path
from typing import Any

import pytest

from bt_ray.settings.config import ServerConfig
from bt_ray.slot.serving.server import server_environment


@pytest.mark.parametrize(
    ("settings", "compiles"),
    [
        ({}, False),
        ({"enforce_eager": True}, False),
        ({"enforce_eager": False}, True),
        ({"no_enforce_eager": True}, True),
        ({"env": {"TORCH_COMPILE_DISABLE": "0"}}, True),
        ({"gpus": 1}, True),
    ],
)
def test_an_eager_server_on_cpu_compiles_nothing(
    settings: dict[str, Any], compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
    env = server_environment(ServerConfig.model_validate(settings), "token", Path("/tmp"))
    assert (env.get("TORCH_COMPILE_DISABLE", "0") == "0") == compiles
