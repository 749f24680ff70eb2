"""The guard, driven as an ASGI application."""

import asyncio
import json
import random
from typing import Any

import pytest

from bt_ray.slot.serving.guard import SERVED_NAME, Guard

TOKEN = {"authorization": "Bearer secret"}
RAW_TOKEN = [(b"authorization", b"Bearer secret")]


class Engine:
    """An engine whose answers say which weights gave them."""

    def __init__(self) -> None:
        self.loaded = "w-0"

    async def load(self, path: str) -> None:
        self.loaded = "in between"
        await asyncio.sleep(0)
        if path == "broken":
            raise RuntimeError("no such file")
        self.loaded = path

    async def load_adapter(self, name: str, path: str) -> None: ...

    async def drop_adapter(self, name: str) -> None: ...

    async def logprobs(self, tokens: list[int], adapter: str | None) -> list[float]:
        return [-1.0] * (len(tokens) - 1)

    async def probe(self) -> None: ...

    def platform(self) -> str:
        return "cpu: none"

    async def sleep(self) -> None: ...

    async def wake(self) -> None: ...


async def post(guard: Guard, path: str, value: Any, method: str = "POST") -> tuple[int, dict[str, Any]]:
    """Status and body, as a client would see them. A connection that breaks off raises."""
    sent: list[dict[str, Any]] = []
    incoming = [{"type": "http.request", "body": json.dumps(value).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        return incoming.pop()

    async def send(message: Any) -> None:
        sent.append(message)

    await guard({"type": "http", "method": method, "path": path, "headers": RAW_TOKEN}, receive, send)
    return sent[0]["status"], json.loads(b"".join(message["body"] for message in sent[1:]))


async def ask_owner(guard: Guard, route: str, **body: Any) -> dict[str, Any]:
    status, value = await post(guard, f"/bt_ray/{route}", body)
    assert status == 200, value
    return value


async def swap(guard: Guard, weights_id: str, drain_s: float = 30) -> None:
    await ask_owner(guard, "close", drain_s=drain_s)
    await ask_owner(guard, "load", path=weights_id)
    await ask_owner(guard, "canary", adapter=None, sequences=[[1, 2, 3]])
    await ask_owner(guard, "open", serving={weights_id: SERVED_NAME})


def call(
    method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None, kind: str = "http"
) -> tuple[int, dict[str, Any], list[bytes]]:
    """Status, body, and the bodies that got through to the application behind the guard."""
    passed: list[bytes] = []
    sent: list[dict[str, Any]] = []
    chunks = [body[: len(body) // 2], body[len(body) // 2 :]]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        passed.append(message.get("body", b""))
        length = dict(scope["headers"]).get(b"content-length")
        assert length is None or int(length) == len(passed[-1])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": chunks.pop(0), "more_body": bool(chunks)}

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in (TOKEN if headers is None else headers).items()]
    raw.append((b"content-length", str(len(body)).encode()))
    scope = {"type": kind, "method": method, "path": path, "headers": raw}
    guard = Guard(app, token="secret", engine=Engine())

    async def run() -> None:
        await ask_owner(guard, "open", serving={"w-1": SERVED_NAME})
        await guard(scope, receive, send)

    asyncio.run(run())
    if sent[0]["type"] == "websocket.close":
        return sent[0]["code"], {}, passed
    return sent[0]["status"], json.loads(sent[1]["body"]), passed


def prompt(model: Any) -> bytes:
    return json.dumps({"model": model, "messages": [{"role": "user", "content": "ü"}]}).encode()


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/chat/completions", "/anything"])
@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer other"}, {"authorization": "secret"}])
def test_nothing_gets_through_without_the_token(path: str, headers: dict[str, str]) -> None:
    status, _, passed = call("POST", path, prompt("w-1"), headers)
    assert (status, passed) == (401, [])


def test_a_prompt_for_the_loaded_weights_gets_through_under_the_served_name() -> None:
    status, _, passed = call("POST", "/v1/chat/completions", prompt("w-1"))
    assert status == 200
    assert json.loads(passed[0]) == {**json.loads(prompt("w-1")), "model": SERVED_NAME}


@pytest.mark.parametrize("model", ["w-2", SERVED_NAME, "", None, ["w-1"]])
def test_a_prompt_for_other_weights_is_refused_with_both_ids(model: Any) -> None:
    status, body, passed = call("POST", "/v1/completions", prompt(model))
    assert (status, passed) == (409, [])
    assert (body["error"]["serving"], body["error"]["asked"]) == ("w-1", model)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"messages": []}', b"\xff"])
def test_a_body_that_names_no_model_is_refused(body: bytes) -> None:
    status, _, passed = call("POST", "/v1/chat/completions", body)
    assert (status, passed) == (400, [])


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/invocations"),
        ("POST", "/collective_rpc"),
        ("POST", "/health"),
        ("GET", "/v1/chat/completions"),
        ("POST", "/v1/chat/completions/"),
        ("POST", "/V1/chat/completions"),
        ("OPTIONS", "/v1/models"),
        ("GET", "/docs"),
    ],
)
def test_only_listed_routes_are_there(method: str, path: str) -> None:
    status, _, passed = call(method, path, prompt("w-1"))
    assert (status, passed) == (404, [])


def test_websockets_are_closed() -> None:
    assert call("GET", "/v1/realtime", kind="websocket")[0] == 1008


def serving(engine: Engine, seconds: float = 0.0) -> Guard:
    """A guarded server that takes a while, and says which weights answered."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        before = engine.loaded
        await asyncio.sleep(seconds)
        body = json.dumps({"by": [before, engine.loaded]}).encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    return Guard(app, token="secret", engine=engine)


def test_thousands_of_requests_through_twenty_swaps_are_answered_by_the_weights_that_they_asked_for() -> None:
    chance = random.Random(0)

    async def run() -> tuple[int, int]:
        guard = serving(Engine(), 0.001)
        await swap(guard, "w-0")
        ended = False
        answered = refused = 0

        async def client() -> None:
            nonlocal answered, refused
            while not ended:
                asked = f"w-{chance.randrange(3)}"
                status, value = await post(guard, "/v1/chat/completions", {"model": asked})
                if status == 200:
                    assert value == {"by": [asked, asked]}
                    answered += 1
                else:
                    assert status in (409, 503)
                    assert value["error"]["code"] == "refused"
                    refused += 1
                    await asyncio.sleep(0.001)

        clients = [asyncio.create_task(client()) for _ in range(32)]
        for number in range(1, 21):
            await asyncio.sleep(0.05)
            await swap(guard, f"w-{number % 3}")
        ended = True
        await asyncio.gather(*clients)
        return answered, refused

    answered, refused = asyncio.run(run())
    assert answered > 2000
    assert refused > 2000


def test_a_stale_client_gets_refusals_only_after_a_swap() -> None:
    async def run() -> None:
        guard = serving(Engine())
        await swap(guard, "w-1")
        await swap(guard, "w-2")
        for _ in range(100):
            status, value = await post(guard, "/v1/completions", {"model": "w-1"})
            assert (status, value["error"]["serving"], value["error"]["asked"]) == (409, "w-2", "w-1")

    asyncio.run(run())


def test_everything_is_refused_while_the_server_is_closed_and_after_a_load_that_failed() -> None:
    async def run() -> None:
        guard = serving(Engine())
        for model in ("w-0", "w-1"):
            assert (await post(guard, "/v1/completions", {"model": model}))[0] == 503, "it starts closed"
        await swap(guard, "w-1")
        await ask_owner(guard, "close", drain_s=1)
        status, value = await post(guard, "/bt_ray/load", {"path": "broken"})
        assert (status, value["error"]["message"]) == (500, "RuntimeError: no such file")
        assert (await post(guard, "/v1/completions", {"model": "w-1"}))[0] == 503

    asyncio.run(run())


def test_requests_that_take_longer_than_the_drain_end_with_an_error() -> None:
    async def run() -> None:
        guard = serving(Engine(), 60)
        await swap(guard, "w-1")
        waiting = [asyncio.create_task(post(guard, "/v1/completions", {"model": "w-1"})) for _ in range(3)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        status, value = await post(guard, "/bt_ray/status", {}, "GET")
        assert (status, value["in_flight"]) == (200, 3)
        await swap(guard, "w-2", drain_s=0.05)
        assert [status for status, _ in await asyncio.gather(*waiting)] == [503] * 3
        assert (await post(guard, "/bt_ray/status", {}, "GET"))[1] == {
            "serving": ["w-2"],
            "open": True,
            "in_flight": 0,
            "answered": 3,
        }

    asyncio.run(run())


def test_an_answer_that_has_begun_breaks_off_rather_than_look_whole() -> None:
    async def streaming(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(60)

    async def run() -> None:
        guard = Guard(streaming, token="secret", engine=Engine())
        await swap(guard, "w-1")
        waiting = asyncio.create_task(post(guard, "/v1/completions", {"model": "w-1", "stream": True}))
        await asyncio.sleep(0.01)
        await ask_owner(guard, "close", drain_s=0.01)
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(run())


@pytest.mark.parametrize("route", ["load", "load_adapter", "drop_adapter", "canary", "open", "sleep"])
def test_nothing_is_loaded_or_asked_while_prompts_are_answered(route: str) -> None:
    async def run() -> None:
        guard = serving(Engine())
        await swap(guard, "w-1")
        body = {"path": "w-2", "name": "w-2", "adapter": None, "sequences": [], "serving": {"w-2": "w-2"}}
        status, value = await post(guard, f"/bt_ray/{route}", body)
        assert (status, value["error"]["message"]) == (500, "RuntimeError: the server must be closed first")

    asyncio.run(run())


def test_several_versions_are_served_at_once_each_under_its_own_name() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        model = json.loads((await receive())["body"])["model"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps({"by": model}).encode()})

    async def run() -> None:
        guard = Guard(app, token="secret", engine=Engine())
        await ask_owner(guard, "load_adapter", name="w-1", path="somewhere")
        await ask_owner(guard, "open", serving={"w": SERVED_NAME, "w-1": "w-1"})
        for asked, name in [("w", SERVED_NAME), ("w-1", "w-1"), ("w", SERVED_NAME)]:
            assert await post(guard, "/v1/completions", {"model": asked}) == (200, {"by": name})
        for asked in (SERVED_NAME, "w-2"):
            status, value = await post(guard, "/v1/completions", {"model": asked})
            assert (status, value["error"]["serving"]) == (409, "w, w-1"), "only ids are served"
        await ask_owner(guard, "close", drain_s=1)
        await ask_owner(guard, "drop_adapter", name="w-1")
        await ask_owner(guard, "open", serving={"w": SERVED_NAME})
        assert (await post(guard, "/v1/completions", {"model": "w-1"}))[0] == 409

    asyncio.run(run())
