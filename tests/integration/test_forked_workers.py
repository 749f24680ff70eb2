"""Ray's forked workers of the tests are workers like any other."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("local_ray")


def test_forked_workers_share_no_random_numbers_and_have_arguments_and_an_environment_of_their_own() -> None:
    import ray

    @ray.remote(num_cpus=0)
    class Worker:
        def told(self) -> dict[str, Any]:
            import random

            import numpy as np

            drawn = [ray.NodeID.from_random().hex(), random.random(), ray.get_runtime_context().get_worker_id(), os.getpid()]
            return {
                "drawn": drawn,
                "numpy": np.random.default_rng().random(),
                "env": os.environ.get("OWN"),
                "path": sys.path[0],
            }

    workers = [Worker.options(runtime_env={"env_vars": {"OWN": str(number)}}).remote() for number in range(3)]  # type: ignore[attr-defined]
    told = ray.get([worker.told.remote() for worker in workers])
    assert [one["env"] for one in told] == ["0", "1", "2"]
    for drawn in zip(*([*one["drawn"], one["numpy"]] for one in told), strict=True):
        assert len(set(drawn)) == len(workers)
    assert not [one for one in told if Path(one["path"]).name == "support"]
    for worker in workers:
        ray.kill(worker)
