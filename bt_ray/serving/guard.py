"""The guard in front of every route of a vLLM server: who may ask, for what, and for which weights.

An ASGI middleware that vLLM loads (`--middleware bt_ray.serving.guard.Guard`), outermost. It refuses whoever does not
bear the sweep's token (401), any route that is not on its list (404), and a request for weights other than the ones
that are loaded (409, with both ids). It runs inside the vLLM process and imports nothing but the standard library.
"""

import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

TOKEN_VARIABLE = "BT_RAY_SERVER_TOKEN"  # noqa: S105 - the name of a variable, not a token
WEIGHTS_VARIABLE = "BT_RAY_SERVED_WEIGHTS"
SERVED_NAME = "bt-ray"
"""The model name that vLLM itself knows. Clients use the id of the weights; the guard checks and rewrites it."""

OPEN_ROUTES = {
    ("GET", "/health"),
    ("GET", "/version"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/v1/models"),
}
"""Routes that anyone with the token may call. Everything that takes a prompt is in `PROMPT_ROUTES`."""

PROMPT_ROUTES = {("POST", "/v1/chat/completions"), ("POST", "/v1/completions")}
"""Routes whose JSON body names a model: the body must name the weights that are loaded."""


class Guard:
    """ASGI middleware; configured by the environment of the vLLM process."""

    def __init__(self, app: App, token: str | None = None, weights_id: str | None = None) -> None:
        self.app = app
        self._token = os.environ[TOKEN_VARIABLE] if token is None else token
        self._weights_id = os.environ[WEIGHTS_VARIABLE] if weights_id is None else weights_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif not self._authorized(scope):
            await _refuse(send, 401, "This server needs the token of its sweep.")
        elif (route := (scope["method"], scope["path"])) in OPEN_ROUTES:
            await self.app(scope, receive, send)
        elif route in PROMPT_ROUTES:
            await self._pass_on_prompt(scope, receive, send)
        else:
            await _refuse(send, 404, f"{route[0]} {route[1]} is not a route of this server.")

    def _authorized(self, scope: Scope) -> bool:
        expected = b"Bearer " + self._token.encode()
        return any(name == b"authorization" and hmac.compare_digest(value, expected) for name, value in scope["headers"])

    async def _pass_on_prompt(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _body(receive)
        try:
            request = json.loads(body)
            asked = request["model"]
        except (ValueError, KeyError, TypeError):
            await _refuse(send, 400, "The body must be a JSON object with a 'model'.")
            return
        if asked != self._weights_id:
            message = f"This server serves weights {self._weights_id!r}; the request asks for {asked!r}."
            await _refuse(send, 409, message, serving=self._weights_id, asked=asked)
            return
        request["model"] = SERVED_NAME
        await self.app(_with_length(scope, rewritten := json.dumps(request).encode()), _replay(rewritten, receive), send)


async def _body(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _with_length(scope: Scope, body: bytes) -> Scope:
    headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
    return {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives `body` once, and then whatever the client still sends (its disconnect)."""
    pending = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed


async def _refuse(send: Send, status: int, message: str, **details: str) -> None:
    body = json.dumps({"error": {"message": message, "type": "refused", "code": status, **details}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
