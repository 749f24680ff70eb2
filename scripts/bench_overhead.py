"""Measure what the step store, the claims and the pool of servers add to a step, and how that grows with the sweep.

    python scripts/bench_overhead.py --strategies 10 100 1000

A real Ray on this machine, the sweep's own actors, a scripted server, a run directory on disk. For each number of
strategies one trial does, for as many steps, what a step costs beside the step itself: claims it, takes a lease on a server
and gives it back, writes the program, commits, and reads the step back as the next trial would. The trials of all other
strategies wait for that step meanwhile, as they do in a sweep whose strategies begin alike.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SUPPORT = ROOT / "tests" / "support"
sys.path[:0] = [str(ROOT / "tests")]

import psutil  # noqa: E402 - the path comes first
import ray  # noqa: E402
from support.scripted_model import write_model  # noqa: E402

from bt_ray.pool.policy_types import Policy  # noqa: E402
from bt_ray.pool.server_pool import ServerPool, ServerSettings  # noqa: E402
from bt_ray.run_dir.step_store import FinishedStep, StepStore, attempt_name  # noqa: E402
from bt_ray.run_dir.storage import open_storage  # noqa: E402
from bt_ray.settings.config import ServerConfig  # noqa: E402
from bt_ray.slot.base_models import base_weights  # noqa: E402
from bt_ray.trial.claims_actor import RemoteClaims, StepClaims  # noqa: E402

PARTS = ("claim", "lease", "write", "commit", "read back", "in all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--steps", type=int, default=200, help="measured for each (default: %(default)s)")
    options = parser.parse_args()
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="error")
    print(f"medians of {options.steps} steps, in ms (95th percentile)")
    print(f"{'strategies':>10}  " + "".join(f"{part:>16}" for part in PARTS) + f"{'claims MB':>11}{'pool MB':>9}")
    for count in options.strategies:
        with tempfile.TemporaryDirectory() as folder:
            print(measured(count, options.steps, Path(folder)), flush=True)


def measured(strategies: int, steps: int, folder: Path) -> str:
    """A line of the table."""
    write_model(folder / "model", skill=2)
    weights = base_weights(str(folder / "model"), {})
    command = [sys.executable, str(SUPPORT / "scripted_server.py")]
    config = ServerConfig.model_validate({"cpus": 0.1, "command": command})
    store = StepStore(open_storage(str(folder / "run")))
    claims = StepClaims.remote(set(), 0)  # type: ignore[attr-defined]
    settings = ServerSettings(config, "token", False, str(folder / "run"))
    pool = ServerPool.remote(settings, {"": Policy(limit=1)}, {"": 1})  # type: ignore[attr-defined]
    lease = ray.get(pool.ask.remote("bench#1", [], "bench#1/first", weights))
    ray.get(pool.end.remote({lease.number: None}))

    took: dict[str, list[float]] = {part: [] for part in PARTS}

    @contextmanager
    def timed(part: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        took[part].append(1000 * (time.perf_counter() - began))

    own = RemoteClaims(claims)
    for number in range(steps):
        key = f"key-{number}"
        with timed("claim"):
            fence = own.claim(key, lambda: None)
        assert isinstance(fence, int)
        waiting = [claims.claim.remote(key, []) for _ in range(strategies - 1)]
        own.may_commit(key, fence)  # answered after those: from now on they all wait
        with timed("lease"):
            lease = ray.get(pool.ask.remote("bench#1", [], f"bench#1/{number}", weights))
            ray.get(pool.end.remote({lease.number: None}))
        attempt = attempt_name(fence)
        with timed("write"):
            program = store.write_program(key, attempt, b'{"demos": []}')
        with timed("commit"):
            assert own.may_commit(key, fence)
            store.commit(finished(key, program, weights.id), attempt)
            own.end(key, fence, committed=True)
        with timed("read back"):
            assert store.read(key) is not None
        took["in all"].append(sum(of[-1] for part, of in took.items() if part != "in all"))
        assert all(ray.get(waiting)), "all others are told that it is committed"
    memory = [resident_mb(actor) for actor in (claims, pool)]
    ray.get(pool.close.remote())
    for actor in (pool, claims):
        ray.kill(actor)
    cells = [f"{statistics.median(of):.2f} ({statistics.quantiles(of, n=20)[-1]:.1f})" for of in took.values()]
    return f"{strategies:10}  " + "".join(f"{cell:>16}" for cell in cells) + f"{memory[0]:11.0f}{memory[1]:9.0f}"


def finished(key: str, program: str, weights_id: str) -> FinishedStep:
    scores = tuple(float(number % 2) for number in range(100))
    return FinishedStep(key, "", "p", 50.0, scores, time.time(), 1.0, {"self": weights_id}, program, 100, {"dspy": "3.4"})


def resident_mb(actor: Any) -> float:
    """Memory of an actor's process."""
    process = psutil.Process(ray.get(actor.__ray_call__.remote(lambda self: os.getpid())))
    return float(process.memory_info().rss) / 1e6


if __name__ == "__main__":
    main()
