"""The actor that decides who computes a step, over all trials of a sweep.

The truth is in the store: this actor's state is only who is at work, and dies with the sweep.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import ray
from ray.actor import ActorHandle

from bt_ray.pool.calls import ask
from bt_ray.pool.liveness import this_actor, until_dead
from bt_ray.run_dir.results import StepFailure
from bt_ray.trial.claims import ClaimTable


@ray.remote(num_cpus=0)
class StepClaims:
    """`bt_ray.trial.claims.ClaimTable`, whose claims end when the trial dies that holds them.

    Args:
        committed: The keys of the steps that are finished.
        first_fence: The first claim's number; above all that the run directory has seen.
    """

    def __init__(self, committed: set[str], first_fence: int) -> None:
        self._table = ClaimTable(committed, first_fence)
        self._watching: dict[int, asyncio.Task[None]] = {}

    async def try_claim(self, key: str, holder_actor: "list[ActorHandle[Any]]") -> "int | bool | StepFailure":
        """`ClaimTable.try_claim` for a trial.

        Args:
            key: The step.
            holder_actor: The trial's own actor in a list (Ray would await a bare handle); the claim ends when it dies.
        """
        granted = self._table.try_claim(key)
        if holder_actor and not isinstance(granted, bool | StepFailure):
            self._watching[granted] = asyncio.create_task(self._end_with(key, granted, holder_actor[0]))
        return granted

    async def claim(self, key: str, holder_actor: "list[ActorHandle[Any]]") -> "int | bool | StepFailure":
        """As `try_claim`, but wait while another is at work."""
        while (granted := await self.try_claim(key, holder_actor)) is False:
            await self._table.wait_for_change(key)
        return granted

    async def may_commit(self, key: str, fence: int) -> bool:
        return self._table.may_commit(key, fence)

    async def end(self, key: str, fence: int, committed: bool = False, failure: StepFailure | None = None) -> None:
        if (watching := self._watching.pop(fence, None)) is not None and watching is not asyncio.current_task():
            watching.cancel()
        self._table.end(key, fence, committed=committed, failure=failure)

    async def _end_with(self, key: str, fence: int, actor: "ActorHandle[Any]") -> None:
        await until_dead(actor)
        await self.end(key, fence)


class RemoteClaims:
    """`bt_ray.trial.steps.Claims` for one trial."""

    def __init__(self, claims: "ActorHandle[Any]") -> None:
        self._claims = claims

    def claim(self, key: str, before_waiting: Callable[[], None]) -> int | StepFailure | None:
        granted: int | bool | StepFailure = ask(self._claims.try_claim, key, this_actor())
        if granted is False:
            before_waiting()
            granted = ask(self._claims.claim, key, this_actor())
        return None if isinstance(granted, bool) else granted

    def may_commit(self, key: str, fence: int) -> bool:
        return bool(ask(self._claims.may_commit, key, fence))

    def end(self, key: str, fence: int, *, committed: bool = False, failure: StepFailure | None = None) -> None:
        ask(self._claims.end, key, fence, committed, failure)
