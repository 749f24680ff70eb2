"""The guard in front of every route of a vLLM server: who may ask, for what, and for which weights.

An ASGI middleware that vLLM loads (`--middleware bt_ray.slot.serving.guard.Guard`), outermost. It refuses whoever does not
bear the sweep's token (401), any route that is not on its list (404), a request for weights other than the ones that are
served (409, with both ids), and every prompt while the server is closed (503). It starts closed. Its own control routes are
what a change of weights is made of: `close` (refuse prompts, and wait until none is under way), `load` or `load_adapter`,
`canary`, `open`; its owner, `bt_ray.slot.serving.server`, calls them in this order and decides between them. So a request is
admitted under weights that are loaded, and they cannot change until it is answered.

It runs inside the vLLM process and imports nothing but the standard library and what stands beside it.
"""

import asyncio
import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from bt_ray.models import OTHER_WEIGHTS, REFUSED
from bt_ray.slot.serving.engine import Engine, vllm_engine

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

TOKEN_VARIABLE = "BT_RAY_SERVER_TOKEN"  # noqa: S105 - the name of a variable, not a token
SERVED_NAME = "bt-ray"
"""The model name that vLLM itself knows of its checkpoint; an adapter has its id there. Clients use the id of the weights,
which the guard checks and rewrites."""

OPEN_ROUTES = {
    ("GET", "/health"),
    ("GET", "/version"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/v1/models"),
}
"""Routes that anyone with the token may call. Everything that takes a prompt is in `PROMPT_ROUTES`."""

PROMPT_ROUTES = {("POST", "/v1/chat/completions"), ("POST", "/v1/completions")}
"""Routes whose JSON body names a model: the body must name weights that are served."""


class Guard:
    """ASGI middleware; configured by the environment of the vLLM process.

    Args:
        app: The server behind it.
        token: What every request must bear; default: from the environment.
        engine: The engine of the server behind it; default: vLLM's, of the application that asks.
    """

    def __init__(self, app: App, token: str | None = None, engine: Engine | None = None) -> None:
        self.app = app
        self.serving: dict[str, str] = {}
        """The ids of the weights that are served, since the server was opened with them, and their names in the engine."""
        self._is_open = False
        self._token = os.environ[TOKEN_VARIABLE] if token is None else token
        self._engine = engine
        self._in_flight: set[asyncio.Task[None]] = set()
        self._ended: set[asyncio.Task[None]] = set()
        self._answered = 0
        self._control = {
            ("GET", "/bt_ray/status"): self._status,
            ("POST", "/bt_ray/close"): self._close,
            ("POST", "/bt_ray/load"): self._load,
            ("POST", "/bt_ray/load_adapter"): self._load_adapter,
            ("POST", "/bt_ray/drop_adapter"): self._drop_adapter,
            ("POST", "/bt_ray/canary"): self._canary,
            ("POST", "/bt_ray/open"): self._open,
            ("POST", "/bt_ray/probe"): self._probe,
            ("POST", "/bt_ray/sleep"): self._sleep,
            ("POST", "/bt_ray/wake"): self._wake,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif not self._is_authorized(scope):
            await _refuse(send, 401, "This server needs the token of its sweep.")
        elif (route := (scope["method"], scope["path"])) in OPEN_ROUTES:
            await self.app(scope, receive, send)
        elif route in PROMPT_ROUTES:
            await self._pass_on_prompt(scope, receive, send)
        elif route in self._control:
            await self._answer_owner(route, scope, receive, send)
        else:
            await _refuse(send, 404, f"{route[0]} {route[1]} is not a route of this server.")

    def _is_authorized(self, scope: Scope) -> bool:
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
        if not self._is_open:
            await _refuse(send, 503, "This server is closed: it goes to other weights, or its slot trains.", asked=asked)
            return
        name = self.serving.get(asked) if isinstance(asked, str) else None
        if name is None:
            serving = ", ".join(self.serving)
            message = f"This server serves weights {serving!r}; the request asks for {asked!r}."
            await _refuse(send, OTHER_WEIGHTS, message, serving=serving, asked=asked)
            return
        request["model"] = name
        rewritten = json.dumps(request).encode()
        await self._count(self.app, _with_length(scope, rewritten), _replay(rewritten, receive), send)

    async def _count(self, app: App, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, as one that is under way until it is answered, or ended by `close`."""
        begun = False

        async def tell(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        task = asyncio.ensure_future(app(scope, receive, tell))
        self._in_flight.add(task)
        try:
            await task
        except asyncio.CancelledError:
            if task not in self._ended or begun:
                raise  # an answer that has begun breaks off, and so does not look whole
            await _refuse(send, 503, "This server went to other weights before the answer was complete.")
        finally:
            self._in_flight.discard(task)
            self._ended.discard(task)
            self._answered += 1

    async def _answer_owner(self, route: tuple[str, str], scope: Scope, receive: Receive, send: Send) -> None:
        if self._engine is None:
            self._engine = vllm_engine(scope["app"].state)
        try:
            body = json.loads(await _body(receive) or b"{}") if route[0] == "POST" else {}
            await _reply(send, 200, await self._control[route](self._engine, body))
        except Exception as error:  # whatever the engine raises is for the owner to judge
            await _refuse(send, 500, f"{type(error).__name__}: {error}")

    async def _status(self, engine: Engine, body: dict[str, Any]) -> dict[str, Any]:
        return {
            "serving": list(self.serving),
            "open": self._is_open,
            "in_flight": len(self._in_flight),
            "answered": self._answered,
        }

    async def _close(self, engine: Engine, body: dict[str, Any]) -> dict[str, Any]:
        """Refuse prompts from now on, and return when none is under way: those that take too long are ended."""
        self._is_open = False
        under_way = set(self._in_flight)
        if under_way:
            _, late = await asyncio.wait(under_way, timeout=body["drain_s"])
            self._ended |= late
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)
        return {"drained": len(under_way)}

    async def _load(self, engine: Engine, body: dict[str, Any]) -> dict[str, Any]:
        self._refuse_open()
        self.serving = {}
        await engine.load(body["path"])
        return {}

    async def _load_adapter(self, engine: Engine, body: dict[str, Any]) -> dict[str, Any]:
        self._refuse_open()
        await engine.load_adapter(body["name"], body["path"])
        return {}

    async def _drop_adapter(self, engine: Engine, body: dict[str, Any]) -> dict[str, Any]:
        self._refuse_open()
        self.serving = {}
        await engine.drop_adapter(body["name"])
        return {}

    async def _canary(self, engine: Engine, body: dict[str, Any]) -> dict[str, Any]:
        self._refuse_open()
        rows = [await engine.logprobs(tokens, body["adapter"]) for tokens in body["sequences"]]
        return {"logprobs": rows, "platform": engine.platform()}

    async def _open(self, engine: Engine, body: dict[str, Any]) -> dict[str, Any]:
        self._refuse_open()
        self.serving, self._is_open = body["serving"], True
        return {}

    async def _probe(self, engine: Engine, body: dict[str, Any]) -> dict[str, Any]:
        await engine.probe()
        return {}

    async def _sleep(self, engine: Engine, body: dict[str, Any]) -> dict[str, Any]:
        self._refuse_open()
        await engine.sleep()
        return {}

    async def _wake(self, engine: Engine, body: dict[str, Any]) -> dict[str, Any]:
        await engine.wake()
        return {}

    def _refuse_open(self) -> None:
        if self._is_open or self._in_flight:
            raise RuntimeError("the server must be closed first")


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

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


async def _refuse(send: Send, status: int, message: str, **details: str | None) -> None:
    await _reply(send, status, {"error": {"message": message, "type": REFUSED, "code": REFUSED, **details}})


async def _reply(send: Send, status: int, value: dict[str, Any]) -> None:
    body = json.dumps(value).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 503:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
