"""What Ray exports of a sweep on each node's metrics port, in Prometheus format, with the prefix `ray_`."""

from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge, Histogram

SECONDS = [0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000]
RUN = ("run",)


class PoolMetrics:
    """The pool's side.

    Args:
        run_dir: Names the sweep.
    """

    def __init__(self, run_dir: str) -> None:
        self._run = {"run": run_dir}
        self._servers = Gauge("bt_ray_servers", "Model servers by state.", ("state", *RUN))
        self._waiting = Gauge("bt_ray_leases_waiting", "Leases that wait for a server.", RUN)
        self._served = Histogram(
            "bt_ray_serve_seconds", "Bringing a server to other weights.", boundaries=SECONDS, tag_keys=("how", *RUN)
        )
        self._states: set[str] = set()

    def servers(self, by_state: Mapping[str, int]) -> None:
        self._states |= set(by_state)
        for state in self._states:
            self._servers.set(by_state.get(state, 0), {"state": state, **self._run})

    def set_waiting(self, leases: int) -> None:
        self._waiting.set(leases, self._run)

    def observe_serve(self, how: str, seconds: float) -> None:
        """`how`: `"swap"` or `"start"`."""
        self._served.observe(seconds, {"how": how, **self._run})


class TrialMetrics:
    """A trial's side.

    Args:
        run_dir: Names the sweep.
    """

    def __init__(self, run_dir: str) -> None:
        self._run = {"run": run_dir}
        self._steps = Histogram("bt_ray_step_seconds", "Computing a step.", boundaries=SECONDS, tag_keys=RUN)
        self._requests = Counter("bt_ray_requests", "Requests that model servers answered.", RUN)
        self._tokens = Counter("bt_ray_tokens", "Tokens of those requests.", ("direction", *RUN))

    def step(self, seconds: float, requests: int, prompt_tokens: int, completion_tokens: int) -> None:
        """What computing one step took."""
        self._steps.observe(seconds, self._run)
        _add(self._requests, requests, self._run)
        _add(self._tokens, prompt_tokens, {"direction": "in", **self._run})
        _add(self._tokens, completion_tokens, {"direction": "out", **self._run})


def _add(counter: Counter, amount: int, tags: dict[str, str]) -> None:
    if amount:  # Ray refuses to add nothing
        counter.inc(amount, tags)
