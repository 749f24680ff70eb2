"""An S3 server in a process of its own: moto's, behind a door that fails on demand.

    python s3_server.py FAULTS_FILE        prints its port

Beside it, `requests.txt` gets a line for each request: its method and path.

While FAULTS_FILE holds `{"kind": "500" | "503" | "reset", "share": 0.3, "seed": 1}`, that share of the requests fails: with
that status, or with a connection that is reset before it was answered.
"""

import json
import os
import random
import socket
import struct
import sys
from pathlib import Path
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "bucket"


class Door:
    def __init__(self, faults_file: Path) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._faults_file = faults_file
        self._log = faults_file.with_name("requests.txt").open("a", buffering=1)
        self._random = random.Random(0)
        self._last: dict[str, Any] = {}

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        self._log.write(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}?{environ['QUERY_STRING']}\n")
        faults = self._faults()
        if faults and self._random.random() < faults["share"]:
            return self._fail(faults["kind"], environ, start_response)
        return self._app(environ, start_response)

    def _faults(self) -> dict[str, Any]:
        faults: dict[str, Any] = json.loads(self._faults_file.read_text() or "{}") if self._faults_file.exists() else {}
        if faults != self._last:
            self._last, self._random = faults, random.Random(faults.get("seed", 0))
        return faults

    def _fail(self, kind: str, environ: dict[str, Any], start_response: Any) -> Any:
        if kind == "reset":
            connection = environ["werkzeug.socket"]
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(connection.detach())
            raise ConnectionResetError
        status = {"500": "500 Internal Server Error", "503": "503 Slow Down"}[kind]
        start_response(status, [("Content-Type", "application/xml"), ("Content-Length", "0")])
        return [b""]


class Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *message: Any) -> None:
        """Nothing."""


def main() -> None:
    server = make_server("127.0.0.1", 0, Door(Path(sys.argv[1])), threaded=True, request_handler=Quiet)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
