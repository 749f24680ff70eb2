"""Whose failure is it? The table, made of real errors: real sockets, a full disk, what Ray and DSPy raise."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dspy
import pytest
import ray
from dspy.utils.exceptions import AdapterParseError
from support.failing_server import failing_server
from support.object_store import ObjectStore

from bt_ray.errors import InfrastructureError, InfrastructureFailure, StorageError, TaskError
from bt_ray.models import Endpoint
from bt_ray.run_dir.storage import Directory, open_storage
from bt_ray.settings.config import LMConfig
from bt_ray.trial.failure_latch import FailureLatch
from bt_ray.trial.failures import Side, side_of
from bt_ray.trial.lm import EmptyTrainingSet, ServedEngine, make_served_lm
from bt_ray.weights import Weights

BASE = Weights("base", "/base")


class At:
    """`Models` at one address."""

    def __init__(self, url: str) -> None:
        self.endpoint = Endpoint(url, BASE.id, "token")
        self.times_lost = 0

    @contextmanager
    def request(self, weights_id: str) -> Iterator[Endpoint]:
        yield self.endpoint

    def report_loss(self, endpoint: Endpoint) -> None:
        self.times_lost += 1

    def report_refusal(self, endpoint: Endpoint) -> None:
        """It asks again, and is refused again."""


def asked(how: str) -> BaseException:
    """What a program sees that asks a model server which fails like this."""
    with failing_server(how) as url:
        models = At(url)
        engine = ServedEngine(models, FailureLatch(), retries=2, timeout_s=0.5, max_connections=4)  # type: ignore[arg-type]
        with pytest.raises(BaseException, match=r".") as caught:
            dspy.Predict("question -> answer")(question=how, lm=make_served_lm(BASE, engine, LMConfig()))
    assert models.times_lost == (3 if isinstance(caught.value, InfrastructureFailure) else 0)
    return caught.value


@pytest.mark.parametrize("how", ["refused", "reset", "timeout", "500", "503", "engine out of memory", "other weights"])
def test_a_model_server_that_does_not_answer_is_lost_infrastructure(how: str) -> None:
    error = asked(how)
    assert isinstance(error, InfrastructureFailure), "DSPy must not turn it into a score"
    assert side_of(error) is Side.INFRASTRUCTURE


@pytest.mark.parametrize("how", ["refused", "reset", "timeout", "500", "503", "429"])
def test_an_api_that_does_not_answer_is_lost_infrastructure(how: str) -> None:
    with failing_server(how) as url:
        lm = dspy.LM("openai/gpt", api_base=f"{url}/v1", api_key="x", num_retries=0, cache=False, timeout=0.5)
        with pytest.raises(Exception, match=r".") as caught:
            lm("question")
    assert side_of(caught.value) is Side.INFRASTRUCTURE


def test_a_prompt_that_does_not_fit_is_the_models() -> None:
    error = asked("context too long")
    assert isinstance(error, dspy.ContextWindowExceededError)
    assert side_of(error) is Side.MODEL


def test_an_answer_that_does_not_parse_is_the_models() -> None:
    with pytest.raises(AdapterParseError) as caught:
        dspy.Predict("question -> number: int")(question="?", lm=dspy.utils.DummyLM([{"number": "many"}] * 4))
    assert side_of(caught.value) is Side.MODEL


@pytest.mark.parametrize(
    "error",
    [
        ray.exceptions.ActorDiedError(),
        ray.exceptions.ActorUnavailableError("it does not answer", None),
        ray.exceptions.NodeDiedError("the node was preempted"),
        ray.exceptions.OutOfMemoryError("the worker was killed"),
        ray.exceptions.WorkerCrashedError(),
        ray.exceptions.ObjectLostError("0" * 40, None, ""),
        ray.exceptions.GetTimeoutError(),
        MemoryError(),
        ConnectionResetError(),
        InfrastructureError("anything lost"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_lost_is_the_infrastructures(error: Exception) -> None:
    assert side_of(error) is Side.INFRASTRUCTURE
    outer = RuntimeError("an optimizer's own words")
    outer.__cause__ = error
    assert side_of(outer) is Side.INFRASTRUCTURE


def test_a_full_disk_is_the_infrastructures(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught, Path("/dev/full").open("w") as full:
        full.write("x" * 100_000)
    assert side_of(caught.value) is Side.INFRASTRUCTURE
    with pytest.raises(StorageError) as told:
        Directory(Path("/dev/full")).write("x", b"")
    assert side_of(told.value) is Side.INFRASTRUCTURE


def test_storage_that_cannot_be_reached_is_the_infrastructures(s3: ObjectStore, tmp_path: Path) -> None:
    storage = open_storage(f"s3://bucket/{tmp_path.name}")
    s3.fail(kind="500", share=1.0)
    try:
        with pytest.raises(StorageError) as caught:
            storage.write("x", b"")
    finally:
        s3.fail()
    assert side_of(caught.value) is Side.INFRASTRUCTURE


@pytest.mark.parametrize(
    "error",
    [
        KeyError("the metric has no such field"),
        RuntimeError("the optimizer rejects its arguments"),
        FileNotFoundError(2, "the metric's own file"),
        EmptyTrainingSet("nothing left to train on"),
        TaskError("anything about the task"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_the_task_raises_is_the_users(error: Exception) -> None:
    assert side_of(error) is Side.USER


def test_what_bt_ray_has_decided_stands() -> None:
    error = TaskError("the task's module asks a server when it is imported")
    error.__cause__ = ConnectionRefusedError()
    assert side_of(error) is Side.USER


def test_an_exception_of_a_task_on_ray_is_its_own(local_ray: None) -> None:
    @ray.remote
    def fail(error: Exception) -> None:
        raise error

    for error, side in ((KeyError("x"), Side.USER), (ConnectionResetError(), Side.INFRASTRUCTURE)):
        with pytest.raises(ray.exceptions.RayTaskError) as caught:
            ray.get(fail.remote(error))
        assert side_of(caught.value) is side


def test_ray_is_not_loaded_for_it() -> None:
    code = "import sys; from bt_ray.trial.failures import side_of; side_of(KeyError()); print('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
