"""Start `s3_server` as a child process, and reach it as the product does: through the environment."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx

from support.s3_server import BUCKET

SERVER = Path(__file__).with_name("s3_server.py")


@dataclass
class ObjectStore:
    """A running S3 server with one bucket."""

    url: str
    faults_file: Path

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "a-secret-that-is-shown-nowhere",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def requests(self, about: str) -> list[str]:
        """The requests so far that have this in their path or query: method and path."""
        lines = self.faults_file.with_name("requests.txt").read_text().splitlines()
        return [line for line in map(unquote, lines) if about in line]

    def fail(self, **faults: Any) -> None:
        """Let requests fail from now on; with no argument, let them through again."""
        part = self.faults_file.with_suffix(".part")
        part.write_text(json.dumps(faults))
        part.replace(self.faults_file)


@contextmanager
def object_store(folder: Path) -> Iterator[ObjectStore]:
    faults_file = folder / "faults.json"
    server = subprocess.Popen(
        [sys.executable, str(SERVER), str(faults_file)], stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    try:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        httpx.put(f"{url}/{BUCKET}", timeout=60).raise_for_status()  # it imports most of moto for its first answer
        yield ObjectStore(url, faults_file)
    finally:
        server.kill()
        server.wait()
