"""Start `api_server`, or another like it, as a child process, beside a copy of the tasks that ask it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.processes import wait_for

SUPPORT = Path(__file__).parent
IMPORTED = ("api_server.py", "scripted_answers.py")


@dataclass(frozen=True)
class Api:
    """A running API, and the file with the tasks that ask it."""

    tasks: Path
    log_file: Path
    process: subprocess.Popen[bytes]

    def log(self) -> list[dict[str, Any]]:
        """What it was asked so far."""
        return [json.loads(line) for line in self.log_file.read_text().splitlines()] if self.log_file.exists() else []


@contextmanager
def running_api(folder: Path, *tasks: str, server: str = "api_server.py") -> Iterator[Api]:
    """An API, whose port is in the file `port` in `folder`.

    Args:
        folder: Gets a copy of the tasks, and of what they import.
        tasks: The files of tasks, the one that asks the API first.
        server: The file of the API.
    """
    for name in (*tasks, *IMPORTED):
        shutil.copy(SUPPORT / name, folder)
    port, log_file = folder / "port", folder / "api.jsonl"
    process = subprocess.Popen([sys.executable, str(SUPPORT / server), str(port), str(log_file)])
    try:
        wait_for("the API", port.exists)
        yield Api(folder / tasks[0], log_file, process)
    finally:
        process.kill()
        process.wait()
