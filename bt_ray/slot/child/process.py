"""The owner's side of a child process: start it under a keeper, wait for it, stop it, read its last log lines."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from bt_ray.errors import InfrastructureError

KEEPER = Path(__file__).with_name("keeper.py")


class ChildProcess:
    """A running child process, started by the constructor.

    It lives in its own session and process group under a keeper (see `bt_ray.slot.child.keeper`), which ends it with all its
    descendants when `stop()` is called or when this process goes, in whatever way.

    Args:
        command: The program and its arguments.
        env: The whole environment of the child. Secrets belong here, never in `command`.
        log_file: Where its standard output and error are appended.
        passed_socket: A bound socket that the child inherits under the same file descriptor number.
        grace_s: Seconds between SIGTERM and SIGKILL.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        log_file: Path,
        passed_socket: socket.socket | None = None,
        grace_s: float = 10.0,
    ) -> None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        self.log_file = log_file
        self._log_start = log_file.stat().st_size if log_file.exists() else 0
        self._grace_s = grace_s
        self.returncode: int | None = None
        self._exited = threading.Event()
        life_read, self._life = os.pipe()
        fd = -1 if passed_socket is None else passed_socket.fileno()
        keeper = [sys.executable, "-I", "-S", str(KEEPER), str(grace_s), str(log_file), str(fd), *command]
        try:
            launcher = subprocess.Popen(
                keeper,
                stdin=life_read,
                stdout=subprocess.PIPE,
                env=dict(env),
                pass_fds=() if fd < 0 else (fd,),
                start_new_session=True,
            )
        except BaseException:
            os.close(self._life)
            raise
        finally:
            os.close(life_read)
        launcher.wait()  # it has forked the keeper and gone
        assert launcher.stdout is not None
        self._reports = launcher.stdout
        first = self._reports.readline()
        if not first:
            os.close(self._life)
            raise InfrastructureError(f"{command[0]} could not be started.\n{self.log_tail()}")
        self.pid: int = json.loads(first)["pid"]
        threading.Thread(target=self._await_exit, name=f"await-{self.pid}", daemon=True).start()

    def _await_exit(self) -> None:
        last = self._reports.readline()
        self._reports.close()
        self.returncode = json.loads(last)["exit"] if last else -9
        self._exited.set()

    @property
    def alive(self) -> bool:
        return not self._exited.is_set()

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Wait until the child has ended and return its exit status (negative: a signal), or None after `timeout_s`."""
        self._exited.wait(timeout_s)
        return self.returncode

    def stop(self) -> None:
        """End the child and all its descendants, and return when they are gone. Harmless when they already are."""
        life, self._life = self._life, -1
        if life >= 0:
            os.close(life)
        if not self._exited.wait(self._grace_s + 10):
            raise InfrastructureError(f"Process {self.pid} did not end within {self._grace_s + 10:.0f} s of SIGKILL.")

    def log_tail(self, lines: int = 20) -> str:
        """The last `lines` lines that the child wrote."""
        try:
            with self.log_file.open("rb") as log:
                log.seek(max(self._log_start, os.fstat(log.fileno()).st_size - 64 * 1024))
                return "\n".join(log.read().decode(errors="replace").splitlines()[-lines:])
        except FileNotFoundError:
            return ""


def open_port(host: str, port: int = 0) -> tuple[socket.socket, int]:
    """Bind a TCP port of `host`, by default a free one, for a child. The caller closes the socket once the child has it."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind((host, port))
    return bound, bound.getsockname()[1]


def child_environment() -> dict[str, str]:
    """The environment for a model's child process: this process's, less what Ray put there for its own workers.

    Ray gives workers `OMP_NUM_THREADS=1`, and its settings and secrets in `RAY_*`; none of them is a child's business.
    The child finds the same bt_ray as this process, whatever its working directory.
    """
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_") and key != "OMP_NUM_THREADS"}
    package_root = str(Path(__file__).parents[3])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, env.get("PYTHONPATH")]))
    env["PYTHONSAFEPATH"] = "1"
    return env
