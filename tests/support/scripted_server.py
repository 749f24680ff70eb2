"""Stands in for `bt_ray.slot.serving.vllm_main`: the same arguments and environment, the real guard, scripted answers.

The model folder holds its skill (`scripted_model`); what it says stands in `scripted_answers`.
Each request is logged to `REQUEST_LOG` as `{"weights", "question", "demos", "hints", "in_flight", "time"}`: the question is
null where a proposal was wanted, in flight are this request and those beside it, and the time is Unix time in seconds.
With `SCRIPTED_TOGETHER`, answers wait until so many requests are in flight.
"""

import argparse
import asyncio
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import uvicorn

from bt_ray.slot.serving.guard import Guard

sys.path.insert(0, str(Path(__file__).parent))  # not there by itself, where PYTHONSAFEPATH is set

from scripted_answers import Said, answer, completion
from scripted_model import logprobs_of, read_skill

TOKENS = 10
"""What an answer is said to need: with less, it is said to be cut off, and is whole all the same."""


class ScriptedEngine:
    """`bt_ray.slot.serving.engine.Engine` of a scripted model. Its faults are files in `SCRIPTED_FAULTS`.

    `wrong_load` holds a folder that the next load takes in place of what it was told; `fail_load` has the next load fail;
    each is taken once. While `hang` is there, no token comes. `errors_until` holds the Unix time until which every prompt
    is answered by HTTP 500.
    """

    def __init__(self, model: Path) -> None:
        self.skill = read_skill(model)
        self.adapters: dict[str, int] = {}

    async def load(self, path: str) -> None:
        if taken := take_fault("fail_load"):
            raise RuntimeError(f"the reload failed: {taken}")
        self.skill = read_skill(Path(take_fault("wrong_load") or path))

    async def load_adapter(self, name: str, path: str) -> None:
        if taken := take_fault("fail_load"):
            raise RuntimeError(f"the adapter could not be loaded: {taken}")
        self.adapters[name] = read_skill(Path(take_fault("wrong_load") or path))

    async def drop_adapter(self, name: str) -> None:
        del self.adapters[name]

    async def logprobs(self, tokens: list[int], adapter: str | None) -> list[float]:
        return logprobs_of(self.skill if adapter is None else self.adapters[adapter], tokens)

    async def probe(self) -> None:
        """A scripted model always has a token, unless it hangs."""
        while fault("hang") is not None:
            await asyncio.sleep(0.1)

    def platform(self) -> str:
        return "cpu: scripted"

    async def sleep(self) -> None: ...

    async def wake(self) -> None: ...


class App:
    def __init__(self, engine: ScriptedEngine) -> None:
        self.engine = engine
        self.delay_s = float(os.environ.get("SCRIPTED_DELAY_S", "0"))
        self.at_once = asyncio.Semaphore(int(os.environ.get("SCRIPTED_AT_ONCE", "1000000")))
        self.together = asyncio.Barrier(int(os.environ.get("SCRIPTED_TOGETHER", "1")))
        self.in_flight = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        if scope["path"] == "/health":
            await self.reply(send, {})
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        await self.complete(json.loads(body), send)

    async def complete(self, request: dict[str, Any], send: Any) -> None:
        skill = self.engine.adapters.get(request["model"], self.engine.skill)
        in_flight = await self.held_back()
        if time.time() < float(fault("errors_until") or 0):
            await self.reply(send, {"error": {"message": "the engine is not well"}}, 500)
            return
        said = answer(skill, request["messages"])
        log(next(name for name, served in self.guard.serving.items() if served == request["model"]), said, in_flight)
        limit = request.get("max_completion_tokens") or request.get("max_tokens") or TOKENS
        await self.reply(send, completion(said, cut_off=limit < TOKENS))

    guard: Guard

    async def held_back(self) -> int:
        """Wait as tests want it. Returns how many requests were in flight when this one came, with it."""
        self.in_flight += 1
        arrived = self.in_flight
        try:
            await self.together.wait()
            async with self.at_once:
                await asyncio.sleep(self.delay_s)
        finally:
            self.in_flight -= 1
        return arrived

    @staticmethod
    async def reply(send: Any, value: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(value).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def fault(name: str) -> str | None:
    """What a test wants to go wrong."""
    try:
        return Path(os.environ["SCRIPTED_FAULTS"], name).read_text()
    except (KeyError, OSError):
        return None


def take_fault(name: str) -> str | None:
    found = fault(name)
    if found is not None:
        Path(os.environ["SCRIPTED_FAULTS"], name).unlink()
    return found


def log(weights_id: str, said: Said, in_flight: int) -> None:
    if file := os.environ.get("REQUEST_LOG"):
        line = {"weights": weights_id, "question": said.question, "demos": said.demos, "hints": said.hints}
        line |= {"in_flight": in_flight, "time": time.time(), "pid": os.getpid()}
        with open(file, "a") as opened:
            opened.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("listen_fd", type=int)
    parser.add_argument("--model", type=Path)
    options, _ = parser.parse_known_args()
    if os.environ.get("SCRIPTED_START") == "die":
        print("the engine found no memory", flush=True)
        sys.exit(7)
    time.sleep(float(os.environ.get("SCRIPTED_START_S", "0")))
    listening = socket.socket(fileno=options.listen_fd)
    engine = ScriptedEngine(options.model)
    app = App(engine)
    app.guard = Guard(app, engine=engine)
    config = uvicorn.Config(app.guard, log_level="warning", lifespan="off")
    asyncio.run(uvicorn.Server(config).serve(sockets=[listening]))


if __name__ == "__main__":
    main()
