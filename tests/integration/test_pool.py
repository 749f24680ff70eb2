"""The pool's actor on a real Ray: it grows and shrinks, and holds several models and versions at once."""

import asyncio
import json
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from support.object_store import ObjectStore
from support.processes import wait_for
from support.scripted_model import write_model

from bt_ray.errors import ServerError, TrainingError
from bt_ray.pool.policy_types import Policy
from bt_ray.run_dir.storage import open_storage
from bt_ray.settings.config import make_config
from bt_ray.slot.base_models import base_weights
from bt_ray.weights import MANIFEST, Weights, fine_tuned

pytestmark = pytest.mark.usefixtures("local_ray")
Pool = Any


@pytest.fixture
def opened(settings: dict[str, Any]) -> Iterator[Callable[..., Pool]]:
    import ray

    from bt_ray.pool.server_pool import ServerPool, ServerSettings

    pools: list[Pool] = []

    def open_pool(
        initial: int = 1, own: Weights | None = None, environment: dict[str, str] | None = None, **policy: Any
    ) -> Pool:
        """A pool, where `own` may have a slot of its own, on nodes with these variables in their environment."""
        server = {**settings["server"], "models": {own.path: {"count": 1, "cpus": 0.5}} if own else {}}
        config = make_config({**settings, "server": server}).server
        given = ServerSettings(config, "token", False, settings["run_dir"], hub_token="hf_of_the_driver")
        policies = {"": Policy(**policy)} | ({own.model: Policy(limit=1, minimum=0)} if own else {})
        made = ServerPool.options(runtime_env={"env_vars": environment or {}})  # type: ignore[attr-defined]
        pools.append(made.remote(given, policies, {"": initial}))
        return pools[-1]

    yield open_pool
    for pool in pools:
        ray.get(pool.close.remote())
        ray.kill(pool)


def ask(pool: Pool, weights: Weights, *, request: str = "", exclusive: bool = False, urgency: int = 0) -> Any:
    """The promise of a lease."""
    return pool.ask.remote("test#1", [], f"test#1/{request or secrets.token_hex(4)}", weights, exclusive, None, urgency)


def servers(pool: Pool) -> int:
    import ray

    placed, placing, _ = ray.get(pool.count_placed.remote())
    return int(placed + placing)


def answer(lease: Any, number: int) -> str:
    body = {"model": lease.endpoint.weights_id, "messages": [{"role": "user", "content": f"number {number}"}]}
    url = f"{lease.endpoint.url}/v1/chat/completions"
    response = httpx.post(url, json=body, headers=lease.endpoint.headers, timeout=120)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"]).splitlines()[1]


@pytest.fixture
def student(model: Path) -> Weights:
    return base_weights(str(model), {})


@pytest.fixture
def teacher(tmp_path: Path) -> Weights:
    """Another, larger model: it knows more."""
    write_model(tmp_path / "teacher", skill=9, tensors=("skill", "layer", "another"))
    return base_weights(str(tmp_path / "teacher"), {})


def test_the_pool_grows_while_leases_wait_and_shrinks_when_nobody_uses_a_server(
    opened: Callable[..., Pool], student: Weights
) -> None:
    import ray

    pool = opened(limit=2, minimum=1, patience_s=60, idle_timeout_s=1.5)
    training = ray.get(ask(pool, student, exclusive=True))
    assert servers(pool) == 1
    shared = ray.get(ask(pool, student))
    assert (servers(pool), shared.server != training.server) == (2, True)
    assert answer(shared, 1) == "2"
    ray.get(pool.end.remote({training.number: None, shared.number: None}))
    wait_for("the pool to shrink", lambda: servers(pool) == 1)
    assert answer(ray.get(ask(pool, student)), 1) == "2"


def test_a_teacher_and_a_student_live_in_one_pool_and_share_one_slot_if_there_is_no_other(
    opened: Callable[..., Pool], student: Weights, teacher: Weights
) -> None:
    import ray

    both = opened(limit=2)
    leases = [ray.get(ask(both, weights)) for weights in (student, teacher, student, teacher)]
    assert [lease.server for lease in leases] == [0, 1, 0, 1]
    assert [answer(lease, 8) for lease in leases] == ["wrong", "16", "wrong", "16"]

    one = opened(limit=1, turn_s=1)
    first = ray.get(ask(one, student))
    second = ray.get(ask(one, teacher), timeout=240)
    assert answer(second, 8) == "16", "the student's turn was over"
    with pytest.raises((AssertionError, httpx.TransportError)):
        answer(first, 8)


def test_a_model_with_a_slot_of_its_own_is_served_in_no_other(
    opened: Callable[..., Pool], student: Weights, teacher: Weights
) -> None:
    import ray

    pool = opened(limit=1, own=teacher)
    leases = [ray.get(ask(pool, weights)) for weights in (teacher, student, teacher)]
    assert [lease.server for lease in leases] == [1, 0, 1]
    assert [answer(lease, 8) for lease in leases] == ["16", "wrong", "16"]


@pytest.mark.parametrize("own", [{}, {"HF_TOKEN": "hf_own"}, {"HUGGING_FACE_HUB_TOKEN": "hf_own"}])
def test_a_node_without_a_token_for_gated_models_gets_the_drivers(
    opened: Callable[..., Pool], student: Weights, own: dict[str, str]
) -> None:
    import ray

    lease = ray.get(ask(opened(limit=1, environment=own), student))
    port = urlsplit(lease.endpoint.url).port
    server = next(it for it in psutil.net_connections() if it.laddr and it.laddr.port == port and it.status == "LISTEN")
    environment = psutil.Process(server.pid).environ()
    tokens = {name: environment[name] for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if name in environment}
    assert tokens == (own or {"HF_TOKEN": "hf_of_the_driver"})


def test_a_call_that_is_made_again_leaves_no_lease_that_nobody_knows(opened: Callable[..., Pool], student: Weights) -> None:
    import ray

    pool = opened(limit=1)
    ray.get(ask(pool, student, request="lost answer", exclusive=True))
    again = ray.get(ask(pool, student, request="lost answer", exclusive=True), timeout=240)
    ray.get(pool.end.remote({again.number: None}))
    assert ray.get(ask(pool, student, exclusive=True), timeout=240).server == again.server


def test_more_urgent_leases_come_first(opened: Callable[..., Pool], student: Weights) -> None:
    import ray

    pool = opened(limit=1)
    held = ray.get(ask(pool, student, exclusive=True))
    later, first = (ask(pool, student, exclusive=True, urgency=urgency) for urgency in (1, 2))
    ray.get(pool.end.remote({held.number: None}))
    assert ray.wait([later, first]) == ([first], [later])


def test_many_trials_share_one_start(opened: Callable[..., Pool], student: Weights) -> None:
    import ray

    pool = opened(limit=1)
    leases = ray.get([ask(pool, student) for _ in range(20)])
    with ThreadPoolExecutor(20) as threads:
        assert set(threads.map(lambda lease: answer(lease, 1), leases)) == {"2"}
    _, events = ray.get(pool.events.remote("", 0))
    assert [event.state for _, event in events if getattr(event, "state", "").startswith("serving")] == ["serving, start"]


def test_weights_are_fetched_to_a_node_while_they_are_waited_for(
    settings: dict[str, Any], opened: Callable[..., Pool], student: Weights, s3: ObjectStore, tmp_path: Path
) -> None:
    import ray

    settings["run_dir"] = f"s3://bucket/{tmp_path.name}/run"
    manifest = {"id": "student-ft-1", "parent": student.id}
    write_model(tmp_path / "made", skill=5)
    (tmp_path / "made" / MANIFEST).write_text(json.dumps(manifest))
    open_storage(settings["run_dir"]).upload(tmp_path / "made", "weights/student-ft-1", last=MANIFEST)
    pool = opened(limit=1, environment={"BT_RAY_CACHE": str(tmp_path / "node")})
    training = ray.get(ask(pool, student, exclusive=True))
    waiting = ask(pool, fine_tuned(manifest))
    wait_for("the node's copy", (tmp_path / "node" / "weights" / "student-ft-1" / MANIFEST).is_file)
    requests_before = len(s3.requests("student-ft-1/model.safetensors"))
    assert not ray.wait([waiting], timeout=0)[0]
    ray.get(pool.end.remote({training.number: None}))
    assert answer(ray.get(waiting), 4) == "8"
    assert len(s3.requests("student-ft-1/model.safetensors")) == requests_before


def test_weights_that_nobody_knows_are_an_error_each_time(settings: dict[str, Any]) -> None:
    from bt_ray.pool.leased_models import LeasedModels

    models = LeasedModels("test", None, make_config(settings))  # type: ignore[arg-type]
    for _ in range(2):
        with pytest.raises(KeyError, match="unknown"), models.request("unknown"):
            pass
    models.close()


def test_a_server_whose_training_does_not_stop_is_replaced(settings: dict[str, Any]) -> None:
    import ray

    from bt_ray.pool.server_pool import ServerPool, ServerSettings

    @ray.remote
    class Stuck:
        def stop(self) -> None:
            raise ServerError("It cannot be killed.")

    given = ServerSettings(make_config(settings).server, "token", False, settings["run_dir"])
    pool = ServerPool.__ray_metadata__.modified_class(given, {}, {})  # type: ignore[attr-defined]
    stuck = Stuck.remote()  # type: ignore[attr-defined]
    asyncio.run(pool._stop(0, stuck))
    with pytest.raises(ray.exceptions.ActorDiedError):
        ray.get(stuck.stop.remote())


def test_a_training_tells_the_pool_what_it_made_with_what_the_trial_asks_for_next(
    settings: dict[str, Any], student: Weights, tmp_path: Path
) -> None:
    import ray

    from bt_ray.pool.leased_models import LeasedModels
    from bt_ray.pool.leases import Lease, Returned

    made = fine_tuned({"id": "student-ft-1", "parent": student.id})

    @ray.remote
    class PoolAndServer:
        """Grants a lease on itself, whose training fails or not, and notes how it ended."""

        def __init__(self) -> None:
            self.returned: list[Returned] = []
            self.asked = 0

        def ask(self, *_: Any, returned: Returned, **__: Any) -> Lease:
            self.asked += 1
            self.returned.append(returned)
            return Lease(self.asked, 0, 0, None, ray.get_runtime_context().current_actor)

        def train(self, parent: Weights, *_: Any) -> Weights:
            if self.asked == 2:
                raise TrainingError("It died.")
            return made

        def end(self, returned: Returned) -> None:
            self.returned.append(returned)

        def told(self) -> list[Returned]:
            return self.returned

    pool = PoolAndServer.remote()  # type: ignore[attr-defined]
    models = LeasedModels("test", pool, make_config(settings))
    models.add(student)
    assert models.finetune(student.id, [], {}) == made
    with pytest.raises(TrainingError):
        models.finetune(student.id, [], {})
    models.finetune(student.id, [], {})
    models.close()
    models.finetune(student.id, [], {})
    assert ray.get(pool.told.remote()) == [{}, {1: made}, {2: None}, {}, {3: made}, {}, {4: made}], (
        "what goes on takes over; the rest ends"
    )
