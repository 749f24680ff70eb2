"""Stands in for `bt_ray.serving.vllm_main`: the same arguments and environment, the real guard, scripted answers.

The model folder holds `skill.json`. A question "number 7" has the answer "14". The model answers it right if
`7 % 10 < skill + demos in the prompt (3 at most)`, else it answers "wrong"; so every score is known in advance.
Each request is logged to `REQUEST_LOG` as `{"weights", "question", "demos"}`.
"""

import argparse
import asyncio
import json
import os
import re
import socket
import sys
import time
from pathlib import Path
from typing import Any

import uvicorn

from bt_ray.serving.guard import WEIGHTS_VARIABLE, Guard


def answer(skill: int, messages: list[dict[str, Any]]) -> tuple[str, str, int]:
    """The completion, the question and the number of demos in the prompt."""
    demos = min(3, sum(message["role"] == "assistant" for message in messages))
    question = re.findall(r"number (\d+)", messages[-1]["content"])[-1]
    right = int(question) % 10 < skill + demos
    text = str(2 * int(question)) if right else "wrong"
    return f"[[ ## answer ## ]]\n{text}\n\n[[ ## completed ## ]]", question, demos


class App:
    def __init__(self, model: Path) -> None:
        self.skill = json.loads((model / "skill.json").read_text())["skill"]
        self.delay_s = float(os.environ.get("SCRIPTED_DELAY_S", "0"))

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
        await asyncio.sleep(self.delay_s)
        text, question, demos = answer(self.skill, json.loads(body)["messages"])
        log(question, demos)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        await self.reply(
            send, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
        )

    @staticmethod
    async def reply(send: Any, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def log(question: str, demos: int) -> None:
    if file := os.environ.get("REQUEST_LOG"):
        line = {"weights": os.environ[WEIGHTS_VARIABLE], "question": question, "demos": demos, "pid": os.getpid()}
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
    config = uvicorn.Config(Guard(App(options.model)), log_level="warning", lifespan="off")
    asyncio.run(uvicorn.Server(config).serve(sockets=[listening]))


if __name__ == "__main__":
    main()
