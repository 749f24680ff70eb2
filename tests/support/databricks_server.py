"""A Databricks workspace, as its SDK and DSPy's `DatabricksProvider` ask it: files, models and serving endpoints.

    python databricks_server.py PORT_FILE LOG_FILE

Fine-tunes are ordered under `/fine-tunes`, a route of this server's own, and are completed at once. A model that is
registered as `catalog.schema.skill-7` is served, once an endpoint was made for it, and has skill 7. Nothing is served
that was not deployed, but for the model that a fine-tune starts from. Each file is logged as `{"file", "lines"}`, each
fine-tune as it was ordered, each endpoint as `{"endpoint", "entity_version"}`.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # not there by itself, where PYTHONSAFEPATH is set

from api_server import KEY, Api, serve
from scripted_answers import Said, completion

BASE = "skill-4"
FILES, FOLDERS, VOLUMES = "/api/2.0/fs/files", "/api/2.0/fs/directories", "/api/2.1/unity-catalog/volumes/"
MODELS, ENDPOINTS = "/api/2.1/unity-catalog/models/", "/api/2.0/serving-endpoints"
GREETING = [{"role": "user", "content": "hi"}]
"""What DSPy's provider asks of an endpoint until it is ready."""
NO_SUCH = {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "There is none of this name."}


class Workspace(Api):
    """The volume `main.default.data`, and what is put there."""

    folders: set[str] = set()  # noqa: RUF012 - shared by all requests
    registered: set[str] = set()  # noqa: RUF012
    endpoints: set[str] = {BASE}  # noqa: RUF012

    def do_HEAD(self) -> None:
        self.empty(200 if self.path.removeprefix(FOLDERS) in self.folders else 404)

    def do_PUT(self) -> None:
        body = self.body()
        if self.path.startswith(FOLDERS):
            self.folders.add(self.path.removeprefix(FOLDERS))
        else:
            file = self.path.removeprefix(FILES).partition("?")[0]
            assert str(Path(file).parent) in self.folders
            self.files[file] = body
            self.note(file=file, lines=body.count("\n"))
        self.empty(204)

    def do_POST(self) -> None:
        body = json.loads(self.body())
        if not self.is_allowed():
            self.reply({"error_code": "UNAUTHENTICATED", "message": "The token is wrong."}, 401)
        elif self.path == "/serving-endpoints/chat/completions":
            if body["model"] not in self.endpoints:
                self.reply(NO_SUCH, 404)
            elif body["messages"] == GREETING:
                self.reply({**completion(Said("Hello.")), "model": body["model"]})
            else:
                self.chat(body)
        elif self.path == "/fine-tunes":
            assert body["train_data_path"] in self.files
            self.note(**body)
            self.registered.add(body["register_to"])
            self.reply({"name": "run-1"})
        else:
            (entity,) = body["config"]["served_entities"]
            self.endpoints.add(body["name"])
            self.note(endpoint=body["name"], entity_version=entity["entity_version"])
            self.reply({"name": body["name"]})

    def do_GET(self) -> None:
        self.body()
        *_, name, last = self.path.partition("?")[0].split("/")
        if self.path.startswith(VOLUMES) and last == "main.default.data":
            self.reply({"full_name": last})
        elif self.path.startswith(MODELS) and name in self.registered:
            self.reply({"model_versions": [{"version": 1, "model_name": name}]})
        elif self.path.startswith(f"{ENDPOINTS}/get-model-optimization-info/") and name in self.registered:
            self.reply({"optimizable": True, "throughput_chunk_size": 980})
        elif self.path == "/fine-tunes/run-1":
            self.reply({"status": "Completed"})
        else:
            self.reply(NO_SUCH, 404)

    def body(self) -> str:
        return self.rfile.read(int(self.headers["content-length"] or 0)).decode()

    def is_allowed(self) -> bool:
        return bool(self.headers["authorization"] == f"Bearer {KEY}")

    def empty(self, status: int) -> None:
        self.send_response(status)
        self.send_header("content-length", "0")
        self.end_headers()

    def note(self, **values: Any) -> None:
        if "prompt" not in values:
            super().note(**values)


if __name__ == "__main__":
    serve(Workspace)
