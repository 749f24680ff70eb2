"""The actor that decides who computes a step, so that each is computed once however many trials want it.

A claim is a trial's right to compute and commit a step, until it commits, fails or dies. Whoever else wants the step waits
here, and takes over at once if the claim ends without a commit. The truth is in the store: this actor's state is only who is
at work, and dies with the sweep.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle

from bt_ray.actors.calls import ask
from bt_ray.actors.liveness import this_actor, until_dead
from bt_ray.results import StepFailure


@dataclass
class _Step:
    committed: bool = False
    failure: StepFailure | None = None
    fence: int | None = None
    """The number of the claim at work, None where nobody is."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def announce(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


@ray.remote(num_cpus=0)
class StepClaims:
    """Grants claims on steps, named by their keys.

    Args:
        committed: The keys of the steps that are finished.
        first_fence: The first claim's number; above all that the run directory has seen.
    """

    def __init__(self, committed: set[str], first_fence: int) -> None:
        self._steps: dict[str, _Step] = {key: _Step(committed=True) for key in committed}
        self._next_fence = first_fence
        self._watching: dict[int, asyncio.Task[None]] = {}

    async def try_claim(self, key: str, holder_actor: "list[ActorHandle[Any]]") -> "int | bool | StepFailure":
        """Claim a step without waiting.

        Args:
            key: The step.
            holder_actor: The trial's own actor in a list (Ray would await a bare handle); the claim ends when it dies.

        Returns:
            The claim's number: compute it. True: it is committed. False: another is at work. Or how it failed.
        """
        step = self._steps.setdefault(key, _Step())
        if step.committed:
            return True
        if step.failure is not None:
            return step.failure
        if step.fence is not None:
            return False
        step.fence, self._next_fence = self._next_fence, self._next_fence + 1
        if holder_actor:
            self._watching[step.fence] = asyncio.create_task(self._end_with(key, step.fence, holder_actor[0]))
        return step.fence

    async def claim(self, key: str, holder_actor: "list[ActorHandle[Any]]") -> "int | bool | StepFailure":
        """As `try_claim`, but wait while another is at work."""
        while (granted := await self.try_claim(key, holder_actor)) is False:
            await self._steps[key].changed.wait()
        return granted

    async def may_commit(self, key: str, fence: int) -> bool:
        """Whether this claim still holds. One that was given up for dead must not commit."""
        return self._steps[key].fence == fence

    async def end(self, key: str, fence: int, committed: bool = False, failure: StepFailure | None = None) -> None:
        """End a claim: the step is committed, has failed, or is free for the next who wants it."""
        step = self._steps[key]
        if (watching := self._watching.pop(fence, None)) is not None and watching is not asyncio.current_task():
            watching.cancel()
        if step.fence == fence:
            step.fence, step.committed, step.failure = None, committed, failure
            step.announce()

    async def _end_with(self, key: str, fence: int, actor: "ActorHandle[Any]") -> None:
        await until_dead(actor)
        await self.end(key, fence)


class RemoteClaims:
    """`bt_ray.kept_steps.Claims` for one trial."""

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
