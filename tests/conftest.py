"""Fixtures for all tests. The environment is set before anything imports DSPy or Ray."""

import json
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

ROOT = Path(__file__).parents[1]
SUPPORT = ROOT / "tests" / "support"
MARK = "BT_RAY_TEST_RUN"

_scratch = tempfile.TemporaryDirectory(prefix="bt_ray_tests_")
os.environ |= {
    "DSPY_CACHEDIR": f"{_scratch.name}/dspy_cache",
    "BT_RAY_CACHE": f"{_scratch.name}/bt_ray_cache",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray listens on 127.0.0.1 only
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # Ray's 15 lets a worker wait for minutes while another test's vLLM computes
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_CACHE": f"{_scratch.name}/hub",
    MARK: uuid.uuid4().hex,  # every process that a test starts, however indirectly, carries it
}
for name in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
    os.environ.pop(name, None)
sys.path.insert(0, str(ROOT / "tests"))
pytest.register_assert_rewrite("support.both_sides")

from support.forked_workers import forked_workers  # noqa: E402 - the environment comes first
from support.hub_copy import write_ref  # noqa: E402
from support.object_store import ObjectStore, object_store  # noqa: E402
from support.scripted_model import write_model  # noqa: E402
from support.slot_host import Host  # noqa: E402
from support.slot_models import SlotModels  # noqa: E402

from bt_ray.run_dir.storage import Directory, Storage, open_storage  # noqa: E402
from bt_ray.settings.config import make_config  # noqa: E402
from bt_ray.trial.lm import ServedLM  # noqa: E402

for of_the_pages in ("org/model", "Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen3-1.7B", "Qwen/Qwen3-32B"):
    write_ref(of_the_pages)
# No law here is about time, and a machine that does other things besides is slow.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would what they start


def scripted_sweep(folder: Path) -> dict[str, Any]:
    """The values of a sweep with scripted server and trainer, and a model that answers `n` right if `n % 10 < 2`."""
    model = folder / "scripted-model"
    write_model(model, skill=2)
    (model / "config.json").write_text(json.dumps({"made for": str(folder)}))
    return {
        "task": f"{SUPPORT / 'tasks.py'}:double",
        "model": str(model),
        "strategies": ["p -> w", "w -> p"],
        "run_dir": str(folder / "run"),
        "num_threads": 4,
        "server": {
            "count": 2,
            "command": [sys.executable, str(SUPPORT / "scripted_server.py")],
            "env": {"REQUEST_LOG": str(folder / "requests.jsonl")},
        },
        "train": {"command": [sys.executable, str(SUPPORT / "scripted_trainer.py")]},
    }


SCRIPTED_SCORES = {
    ("p -> w", ""): 20.0,
    ("p -> w", "p"): 40.0,
    ("p -> w", "p -> w"): 70.0,
    ("w -> p", ""): 20.0,
    ("w -> p", "w"): 50.0,
    ("w -> p", "w -> p"): 70.0,
}
"""Of `scripted_sweep`: the base model answers 2 of 10 right, two demos add 2, a fine-tune adds 3."""


def logged_requests(folder: Path) -> list[dict[str, Any]]:
    """The requests that the servers of `scripted_sweep(folder)` answered so far."""
    file = folder / "requests.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return scripted_sweep(tmp_path)


@pytest.fixture
def model(settings: dict[str, Any]) -> Path:
    """A folder that passes for a checkpoint."""
    return Path(settings["model"])


@pytest.fixture
def request_log(tmp_path: Path) -> Any:
    return lambda: logged_requests(tmp_path)


@pytest.fixture
def host(settings: dict[str, Any], tmp_path: Path) -> Iterator[Host]:
    made = Host(settings, tmp_path)
    yield made
    for slot in made.slots:
        slot.close()


@pytest.fixture
def lm(settings: dict[str, Any], tmp_path: Path) -> Iterator[ServedLM]:
    """The scripted model's LM, with a slot in this process: its server starts with the first request."""
    models = SlotModels(make_config(settings), tmp_path)
    served = models.lm()
    served.cache = False
    yield served
    models.close()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """An S3 server of the test session's own, which this process and all that it starts find in their environment."""
    with object_store(tmp_path_factory.mktemp("s3")) as store:
        os.environ |= store.environment
        yield store


@pytest.fixture(params=["disk", "shared", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A run directory on this machine's disk, on one that counts as shared, and in an object store."""
    if request.param == "s3":
        request.getfixturevalue("s3")
        return open_storage(f"s3://bucket/{tmp_path.name}/run")
    return Directory(tmp_path / "run", in_place=request.param == "disk")


@pytest.fixture(scope="session")
def local_ray(s3: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One Ray of the test session's own, with more logical cores than the machine has."""
    import ray

    from bt_ray.driver.ray_session import DRIVER_ENVIRONMENT

    os.environ |= DRIVER_ENVIRONMENT
    with forked_workers(tmp_path_factory.mktemp("ray")):
        ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="error")
        yield
        ray.shutdown()


TOGETHER = {"test_job.py", "test_optimizers.py", "test_report_page.py", "test_reuse.py", "test_winner.py"}
"""Files whose tests share what is costly to make."""


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Which tests run in one process, one after the other: those with vLLM, and those of the files that say so."""
    from xdist.scheduler import LoadScopeScheduling

    class Grouped(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = Path(nodeid.partition("::")[0]).name
            if file.startswith("test_vllm_"):
                return "vllm"
            return file if file in TOGETHER else nodeid

    return Grouped(config, log)
