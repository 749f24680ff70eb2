"""The sweep's side of the Ray cluster: connect to it, open the pool of model servers, watch it."""

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from bt_ray.errors import ResourcesError, amount
from bt_ray.events import Connected, Event, ServerChanged, ServerDid, ServerReplaced, Stage
from bt_ray.pool.resources import check_resources
from bt_ray.run_dir.event_log import EventLog
from bt_ray.run_dir.storage import Storage
from bt_ray.settings.config import SweepConfig
from bt_ray.weights import Weights

Listener = Callable[[Event], None]
AUTOSCALER_S, LOOK_S = 10.0, 5.0
"""Seconds after which the autoscaler is asked about servers that wait for room, and between two such looks."""
REPLACED = ("serving, start", "dead")
"""States of a server that nobody expected, where a reason is given."""

DRIVER_ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a task's relative paths mean the same in every process
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # they cost 3 s for files that nobody reads
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the sweep at once, and this module cleans up
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def inside_job() -> bool:
    """Whether this is the driver of a Ray job, whose working directory is a copy that goes away."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


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
        context = ray.init(
            address="local" if own else (address or "auto"),
            include_dashboard=False if own else None,
            log_to_driver=False,
            logging_level="error",
            configure_logging=False,
        )
    except ConnectionError as error:
        raise ResourcesError(f"No Ray cluster at {address or 'auto'}: {error}") from None
    try:
        tell(Connected(f"http://{context.dashboard_url}" if context.dashboard_url else ""))
        yield own
    finally:
        ray.shutdown()


@contextmanager
def opened_pool(
    config: SweepConfig,
    run_dir: str,
    needed: Mapping[str, int],
    first: Mapping[str, Weights],
    own: bool,
    tell: Listener,
) -> Iterator[Any]:
    """The pool of model servers, with those placed that the sweep needs at least, before the first trial wants one.

    On a cluster that adds nodes by itself the pool grows on demand, from `needed` or one up to `server.count`; on any other
    all servers are placed at once. They listen on their node's address only where another node may need them.

    Args:
        config: The sweep's settings.
        run_dir: Its run directory.
        needed: Servers that a trial needs at a time, by whose slots they are in (`bt_ray.driver.check.Checked`).
        first: What they are started with, before a trial asks, by the same.
        own: Whether this Ray is the sweep's own.
        tell: Told what happens.

    Raises:
        ResourcesError: The cluster can never hold them.
    """
    from huggingface_hub import get_token

    from bt_ray.pool.nodes import beside_the_driver, node_resources
    from bt_ray.pool.policy_types import Policy
    from bt_ray.pool.server_pool import ServerPool, ServerSettings

    nodes = node_resources()
    for warning in check_resources(config, nodes, needed):
        tell(Stage(warning))
    across_nodes = not own and (len(nodes) > 1 or config.autoscaling)
    servers = {slots: config.server.of(slots) for slots in {"": 0, **needed}}
    policies = {
        slots: Policy(
            limit=server.count,
            minimum=min(needed.get(slots, 0), server.count),
            turn_s=server.turn_s,
            idle_timeout_s=server.idle_timeout_s,
            stays_up=server.server_while_training != "stop",
            adapters=server.adapters,
        )
        for slots, server in servers.items()
    }
    # One of each at least: a kind of slot that the cluster can never have is told now, not when it is first wanted.
    initial = {slots: max(1, policies[slots].minimum) if config.autoscaling else servers[slots].count for slots in needed}
    tell(Stage(f"Placing {amount(sum(initial.values()), 'model server')}"))
    settings = ServerSettings(config.server, secrets.token_urlsafe(32), across_nodes, run_dir, get_token())
    pool = ServerPool.options(scheduling_strategy=beside_the_driver()).remote(  # type: ignore[attr-defined]
        settings, policies, initial, first
    )
    try:
        _await_placement(pool, initial, config, tell)
        yield pool
    finally:
        _close(pool)


@contextmanager
def step_claims(committed: Collection[str], first_fence: int) -> Iterator[Any]:
    """Who decides which trial computes a step. Ends with the sweep, also where Ray and the driver go on."""
    import ray

    from bt_ray.pool.nodes import beside_the_driver
    from bt_ray.trial.claims_actor import StepClaims

    claims = StepClaims.options(scheduling_strategy=beside_the_driver()).remote(  # type: ignore[attr-defined]
        committed, first_fence
    )
    try:
        yield claims
    finally:
        with contextlib.suppress(Exception):  # the connection may be gone already, and with it the actor
            ray.kill(claims)


def _await_placement(pool: Any, initial: Mapping[str, int], config: SweepConfig, tell: Listener) -> None:
    import ray

    from bt_ray.pool.nodes import NEWS_S, can_never_come, free_resources

    count = sum(initial.values())
    began = told = looked = time.monotonic()
    while True:
        placed, placing, not_created = ray.get(pool.count_placed.remote())
        if not_created:
            raise ResourcesError(f"A model server's actor cannot be started: {not_created[-1]}")
        if not placing:  # one that is not wanted yet may have been placed and released meanwhile
            return
        now = time.monotonic()
        if config.autoscaling and now - began > AUTOSCALER_S and now - looked > LOOK_S:
            looked = now
            for server in map(config.server.of, initial):
                if can_never_come(server):
                    raise ResourcesError(
                        f"A server needs {server.needs} on one node, and the cluster's autoscaler has no type of node with "
                        "that. Make the servers smaller, or give the cluster such nodes."
                    )
        if now - told > NEWS_S:
            told = now
            tell(Stage(f"Waiting for room for {count - placed} of {count} servers; free now: {free_resources()}"))
        time.sleep(0.1)  # Ray tells nobody when an actor is placed but who waits for a call of it


def _close(pool: Any) -> None:
    """End the servers' processes and actors. The processes would end with the actors anyway."""
    import ray

    try:
        ray.wait([pool.close.remote()], timeout=30)
        ray.kill(pool)
    except Exception:  # the connection may be gone already, and with it the actors
        return


@contextmanager
def watched(pool: Any, storage: Storage, tell: Listener) -> Iterator[None]:
    """Tell what the servers do, once a second where it changed, and keep the pool's events in `events.jsonl`."""
    watch = _PoolWatch(pool, storage, tell)
    ended = threading.Event()
    thread = threading.Thread(target=watch.run, args=(ended,), name="watch-servers", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=15)
        with contextlib.suppress(Exception):  # the connection may be closed
            watch.look()
        watch.log.close()


class _PoolWatch:
    """Looks at the pool, and tells what is new."""

    def __init__(self, pool: Any, storage: Storage, tell: Listener) -> None:
        self.log = EventLog(storage)
        self._pool = pool
        self._tell = tell
        self._told: dict[int, ServerChanged] = {}
        self._session, self._after = "", 0

    def run(self, ended: threading.Event) -> None:
        import ray

        while not ended.wait(1.0):
            try:
                self.look()
            except ray.exceptions.RayError:
                continue  # the pool is being started again; the next look tells
            except Exception:
                return  # the connection is closed

    def look(self) -> None:
        import ray

        self._session, events = ray.get(self._pool.events.remote(self._session, self._after), timeout=10)
        self.log.add([event for _, event in events])
        for number, event in events:
            self._after = number
            if isinstance(event, ServerDid) and event.reason and event.state in REPLACED:
                self._tell(ServerReplaced(event.server, event.reason.partition("\n")[0]))
        views = ray.get(self._pool.status.remote(), timeout=15)
        seen = {v.server: ServerChanged(v.server, v.state, v.weights_id, ", ".join(v.holders), v.detail) for v in views}
        gone = {number for number in self._told.keys() - seen.keys() if self._told[number].state != "gone"}
        for change in [*(ServerChanged(number, "gone", None, None, "") for number in gone), *seen.values()]:
            if self._told.get(change.server) != change:
                self._told[change.server] = change
                self._tell(change)


def cause_of(error: Exception) -> str:
    """What the innermost error says, in a line: Ray wraps it in the tracebacks of every process that it went through."""
    while (inner := getattr(error, "cause", None)) is not None:
        error = inner
    return str(error).strip().partition("\n")[0] or repr(error)
