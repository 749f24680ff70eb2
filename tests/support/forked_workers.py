"""Ray's workers as forks of one process that has imported all of bt_ray: they start within a tenth of the CPU time.

    python forked_workers.py serve 3       forks a worker for each connection to the socket that is file descriptor 3
    python forked_workers.py WORKER.py ARGUMENTS...     what Ray starts for a worker: asks for a fork, and ends when it ends

A worker is what Ray wants it to be: its arguments, environment, folder, process group and standard streams are those of the
process that Ray started. What it does not show is whether it could import all it needs by itself; sweeps of a Ray of their
own and sweeps on a cluster show that (`test_no_orphans`, `test_job`).
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SOCKET = "BT_RAY_TEST_FORKED_WORKERS"
STREAMS = (0, 1, 2)
IMPORTED = (
    "ray.tune",
    "bt_ray.trial.trial",
    "bt_ray.trial.setup",
    "bt_ray.trial.better_together",
    "bt_ray.trial.steps",
    "bt_ray.trial.one_core",
    "bt_ray.pool.leased_models",
    "bt_ray.pool.server_pool",
    "bt_ray.trial.claims_actor",
)


@contextlib.contextmanager
def forked_workers(folder: Path) -> Iterator[None]:
    """Within it, a Ray that this process starts has workers that are forked. `folder` gets a socket."""
    from ray._private import ray_constants

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "workers"))
        listening.listen(100)
        number = listening.fileno()
        command = [sys.executable, __file__, "serve", str(number)]
        server = subprocess.Popen(command, pass_fds=[number], stdin=subprocess.PIPE)  # with whose end it ends
    os.environ[SOCKET] = str(folder / "workers")
    setup = ray_constants.SETUP_WORKER_FILENAME
    try:
        ray_constants.SETUP_WORKER_FILENAME = __file__  # Ray joins it to a folder of its own, which a whole path outdoes
        yield
    finally:
        ray_constants.SETUP_WORKER_FILENAME = setup
        del os.environ[SOCKET]
        server.kill()
        server.wait()


def serve(listening: socket.socket) -> None:
    """Fork a worker for each connection, and import with the environment of the first: Ray's modules read it."""
    imported = False
    while sys.stdin not in select.select([sys.stdin, listening], [], [])[0]:
        connection, _ = listening.accept()
        wanted, streams = receive(connection)
        if not imported:
            os.environ |= wanted["environment"]
            import_all()
            gc.freeze()
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the workers
            imported = True
        if os.fork() == 0:
            listening.close()
            be_worker(wanted, streams)
        for stream in streams:
            os.close(stream)
        connection.close()  # the worker has it until it ends


def import_all() -> None:
    """Import what workers do, and leave Ray's source of random numbers alone: once used, all forks would have the same."""
    import ray.actor

    kind = ray.actor.ActorClassID
    ray.actor.ActorClassID = SimpleNamespace(from_random=lambda: kind(os.urandom(kind.size())))  # for each @ray.remote class
    for name in IMPORTED:
        importlib.import_module(name)
    ray.actor.ActorClassID = kind


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    size = int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "big")
    text, streams, _, _ = socket.recv_fds(connection, size, len(STREAMS))
    while len(text) < size:
        text += connection.recv(size - len(text))
    return json.loads(text), streams


def be_worker(wanted: dict[str, Any], streams: list[int]) -> None:
    """Run Ray's script for a worker as if this process had been started for it, and end."""
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setpgid(0, wanted["group"])
        os.chdir(wanted["folder"])
        for number, stream in zip(STREAMS, streams, strict=True):
            os.dup2(stream, number)
            os.close(stream)
        os.environ.clear()
        os.environ |= wanted["environment"]
        sys.argv = with_runtime_environment(wanted["arguments"])
        sys.path[0] = os.path.dirname(sys.argv[0])
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def with_runtime_environment(arguments: list[str]) -> list[str]:
    """What Ray's `setup_worker.py` does with its arguments, which has others for the worker."""
    kept = []
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name == "--serialized-runtime-env-context":
            context = json.loads(value)
            assert not context["command_prefix"], "a working directory of its own is not supported here"
            os.environ |= context["env_vars"]
        elif name != "--language":
            kept.append(argument)
    return kept


def ask(arguments: list[str]) -> None:
    """Have a worker forked, and wait for its end."""
    wanted = {"arguments": arguments, "environment": {**os.environ}, "folder": os.getcwd(), "group": os.getpgid(0)}
    text = json.dumps(wanted).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[SOCKET])
        connection.sendall(len(text).to_bytes(8, "big"))
        sent = socket.send_fds(connection, [text], STREAMS)
        connection.sendall(text[sent:])
        connection.recv(1)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(socket.socket(fileno=int(sys.argv[2])))
    else:
        ask(sys.argv[1:])
