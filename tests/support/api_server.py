"""An API that is no server of a sweep: OpenAI's chat and fine-tuning routes, with scripted answers, over a real socket.

    python api_server.py PORT_FILE LOG_FILE

The model `skill-4` has skill 4 (see `scripted_answers`); a fine-tune of it has skill 7. A request without the key
`KEY` is refused. Each chat request is logged as `{"model", "question", "prompt", "time"}` (the question is null where a
proposal was wanted, the prompt is the last message, the time Unix time in seconds), each fine-tune as
`{"model", "examples"}`.
"""

import json
import re
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # not there by itself, where PYTHONSAFEPATH is set

from scripted_answers import answer, completion

KEY = "an-api-key-that-no-file-may-hold"
GAIN = 3


class Api(BaseHTTPRequestHandler):
    """Files and fine-tunes live as long as the process."""

    protocol_version = "HTTP/1.1"
    log_file: Path
    files: dict[str, str] = {}  # noqa: RUF012 - shared by all requests
    jobs: dict[str, dict[str, Any]] = {}  # noqa: RUF012

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        if self.headers["authorization"] != f"Bearer {KEY}":
            self.reply({"error": {"message": "Incorrect API key provided.", "type": "invalid_request_error"}}, 401)
        elif self.path == "/v1/chat/completions":
            self.chat(json.loads(body))
        elif self.path == "/v1/files":
            name = f"file-{len(self.files)}"
            self.files[name] = body
            self.reply({"id": name, "object": "file", "purpose": "fine-tune", "filename": "data.jsonl"})
        else:
            self.fine_tune(json.loads(body))

    def do_GET(self) -> None:
        name = self.path.split("/")[-1].partition("?")[0]
        if name == "events":
            self.reply({"object": "list", "data": [], "has_more": False})
        else:
            self.reply(self.jobs[name])

    def chat(self, request: dict[str, Any]) -> None:
        skill = int(re.findall(r"skill-(\d+)", request["model"])[0])
        said = answer(skill, request["messages"])
        prompt = request["messages"][-1]["content"]
        self.note(model=request["model"], question=said.question, prompt=prompt, time=time.time())
        self.reply({**completion(said), "model": request["model"]})

    def fine_tune(self, request: dict[str, Any]) -> None:
        examples = self.files[request["training_file"]].count('"messages"')
        self.note(model=request["model"], examples=examples, hyperparameters=request["hyperparameters"])
        skill = int(re.findall(r"skill-(\d+)", request["model"])[0])
        name = f"job-{len(self.jobs)}"
        job = {"id": name, "object": "fine_tuning.job", "status": "succeeded", "estimated_finish": None}
        self.jobs[name] = {**job, "fine_tuned_model": f"ft:gpt-4o-mini-2024-07-18:skill-{skill + GAIN}::{name}"}
        self.reply(self.jobs[name])

    def note(self, **values: Any) -> None:
        with self.log_file.open("a") as log:
            log.write(json.dumps(values) + "\n")

    def reply(self, value: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None: ...


def serve(api: type[Api]) -> None:
    port_file, api.log_file = map(Path, sys.argv[1:])
    server = ThreadingHTTPServer(("127.0.0.1", 0), api)
    part = port_file.with_suffix(".part")
    part.write_text(str(server.server_port))
    part.rename(port_file)
    server.serve_forever()


if __name__ == "__main__":
    serve(Api)
