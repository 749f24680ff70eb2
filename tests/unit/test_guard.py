"""The guard, driven as an ASGI application."""

import asyncio
import json
from typing import Any

import pytest

from bt_ray.serving.guard import SERVED_NAME, Guard

TOKEN = {"authorization": "Bearer secret"}


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
    asyncio.run(Guard(app, token="secret", weights_id="w-1")(scope, receive, send))
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
