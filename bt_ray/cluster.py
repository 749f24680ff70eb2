"""The sweep's side of the Ray cluster: connect to it, place the model servers, watch them."""

import os
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bt_ray.config import SweepConfig
from bt_ray.errors import ResourcesError
from bt_ray.events import Event, ServerChanged, Stage
from bt_ray.preflight import check_resources, inside_job

Listener = Callable[[Event], None]

DRIVER_ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a task's relative paths mean the same in every process
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # they cost 3 s for files that nobody reads
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the sweep at once, and this module cleans up
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


@contextmanager
def connected(address: str | None, tell: Listener) -> Iterator[bool]:
    """A connection to the cluster at `address`, to the job's, or to a Ray of this sweep's own on this machine.

    Gives whether it is the sweep's own.
    """
    os.environ.update(DRIVER_ENVIRONMENT)
    own = address is None and not inside_job() and "RAY_ADDRESS" not in os.environ
    if own:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # listen on 127.0.0.1 only
    import ray

    if ray.is_initialized():
        yield False
        return
    tell(Stage("Starting Ray on this machine" if own else f"Connecting to the Ray cluster {address or ''}".strip()))
    try:
        ray.init(
            address="local" if own else (address or "auto"),
            include_dashboard=False if own else None,
            log_to_driver=False,
            logging_level="error",
            configure_logging=False,
        )
    except ConnectionError as error:
        raise ResourcesError(f"No Ray cluster at {address or 'auto'}: {error}") from None
    try:
        yield own
    finally:
        ray.shutdown()


@contextmanager
def placed_servers(config: SweepConfig, run_dir: str, own: bool, tell: Listener) -> Iterator[tuple[Any, Sequence[Any]]]:
    """The sweep's model servers and their pool, all placed before the first trial wants one.

    They listen on their node's address only where another node may need them.

    Raises:
        ResourcesError: The cluster can never hold them.
    """
    import ray

    from bt_ray.actors.model_server import ModelServer
    from bt_ray.actors.server_pool import ServerPool

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for warning in check_resources(config, nodes):
        tell(Stage(warning))
    token, slot = secrets.token_urlsafe(32), config.server
    across_nodes = not own and (len(nodes) > 1 or config.autoscaling)
    tell(Stage(f"Placing {slot.count} model server{'s' if slot.count > 1 else ''}"))
    servers = [
        ModelServer.options(num_cpus=slot.cpus, num_gpus=slot.gpus).remote(  # type: ignore[attr-defined]
            f"server-{index}", slot, token, across_nodes, run_dir
        )
        for index in range(slot.count)
    ]
    try:
        _await_placement(servers, tell)
        pool = ServerPool.remote(servers)  # type: ignore[attr-defined]
        yield pool, servers
    finally:
        _stop(servers)


def _await_placement(servers: Sequence[Any], tell: Listener) -> None:
    import ray

    waiting = [server.__ray_ready__.remote() for server in servers]
    while waiting:
        ready, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=15)
        try:
            ray.get(ready)
        except ray.exceptions.RayError as error:
            raise ResourcesError(f"A model server's actor cannot be started: {cause_of(error)}") from error
        if waiting:
            free = {name: amount for name, amount in ray.available_resources().items() if name in ("CPU", "GPU")}
            tell(Stage(f"Waiting for room for {len(waiting)} of {len(servers)} servers; free now: {free}"))


def _stop(servers: Sequence[Any]) -> None:
    """End the servers' processes and actors. The processes would end with the actors anyway."""
    import ray

    try:
        ray.wait([server.close.remote() for server in servers], num_returns=len(servers), timeout=15)
        for server in servers:
            ray.kill(server)
    except Exception:  # the connection may be gone already, and with it the actors
        return


@contextmanager
def watched(pool: Any, servers: Sequence[Any], tell: Listener) -> Iterator[None]:
    """Tell what the servers do, once a second where it changed."""
    import ray

    ended = threading.Event()

    def watch() -> None:
        told: dict[int, ServerChanged] = {}
        while not ended.wait(1.0):
            try:
                holders = ray.get(pool.status.remote(), timeout=10)
                statuses = ray.get([server.status.remote() for server in servers], timeout=10)
            except ray.exceptions.RayError:
                continue  # a server is being restarted; the next look tells
            except Exception:
                return  # the connection is closed
            for index, (holder, status) in enumerate(zip(holders, statuses, strict=True)):
                seen = ServerChanged(index, status.state, status.weights_id, holder, status.detail)
                if told.get(index) != seen:
                    told[index] = seen
                    tell(seen)

    thread = threading.Thread(target=watch, name="watch-servers", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=15)


def cause_of(error: Exception) -> str:
    """What the innermost error says, in a line: Ray wraps it in the tracebacks of every process that it went through."""
    while (inner := getattr(error, "cause", None)) is not None:
        error = inner
    return str(error).strip().partition("\n")[0] or repr(error)
