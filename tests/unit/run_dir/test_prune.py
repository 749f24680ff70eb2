"""What prune may remove, and what it must not."""

from pathlib import Path

import pytest
from support.made_sweep import made_sweep

from bt_ray.errors import ConfigError
from bt_ray.run_dir.prune import find_prunable


def test_before_there_is_a_best_program_only_best_removes_nothing(tmp_path: Path) -> None:
    storage = made_sweep(tmp_path, 2, ended=False)
    with pytest.raises(ConfigError, match="has no best program yet, so nothing is removed"):
        find_prunable(storage, only_best=True)
    storage.write_json("best/manifest.json", {"predictors": {"self": storage.names("weights")[0]}})
    found = find_prunable(storage, only_best=True)
    assert found.kept == 1
    assert len(found.names) == len(storage.names("weights")) - 1
