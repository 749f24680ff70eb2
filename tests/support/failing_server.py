"""An OpenAI-compatible server whose every answer fails in one way."""

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

TOO_LONG = (
    '{"error": {"message": "This model\'s maximum context length is 512 tokens. However, you requested 900 tokens.", '
    '"type": "BadRequestError", "param": "input_tokens", "code": 400}}'
)
ENGINE_DEAD = '{"error": {"message": "EngineCore encountered an issue: CUDA out of memory", "code": 500}}'


class Handler(BaseHTTPRequestHandler):
    how: ClassVar[str] = ""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.how == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif self.how == "timeout":
            time.sleep(3)
        else:
            status, body = {
                "500": (500, "{}"),
                "503": (503, "{}"),
                "429": (
                    429,
                    '{"error": {"message": "Rate limit reached", "type": "requests", "code": "rate_limit_exceeded"}}',
                ),
                "engine out of memory": (500, ENGINE_DEAD),
                "other weights": (409, '{"error": {"message": "serving others", "code": 409}}'),
                "context too long": (400, TOO_LONG),
            }[self.how]
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

    def log_message(self, *message: object) -> None:
        """Nothing."""


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *request: object) -> None:
        """Nothing: connections that end badly are what this is for."""


@contextmanager
def failing_server(how: str) -> Iterator[str]:
    """The address of a server that fails like this; one that nobody listens at for `"refused"`."""
    if how == "refused":
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        yield f"http://127.0.0.1:{port}"
        return
    server = QuietServer(("127.0.0.1", 0), type("Failing", (Handler,), {"how": how}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
