"""Who computes a step, so that each is computed once however many trials want it.

A claim is a trial's right to compute and commit a step, until it commits, fails or dies. Whoever else wants the step waits,
and takes over at once if the claim ends without a commit. `bt_ray.trial.claims_actor` puts the table into an actor.
"""

import asyncio
from dataclasses import dataclass, field

from bt_ray.run_dir.results import StepFailure


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


class ClaimTable:
    """Grants claims on steps, named by their keys.

    Args:
        committed: The keys of the steps that are finished.
        first_fence: The first claim's number; above all that the run directory has seen.
    """

    def __init__(self, committed: set[str], first_fence: int) -> None:
        self._steps: dict[str, _Step] = {key: _Step(committed=True) for key in committed}
        self._next_fence = first_fence

    def try_claim(self, key: str) -> int | bool | StepFailure:
        """Claim a step without waiting.

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
        return step.fence

    async def wait_for_change(self, key: str) -> None:
        """Return when the claim on `key` that is at work has ended."""
        await self._steps[key].changed.wait()

    def may_commit(self, key: str, fence: int) -> bool:
        """Whether this claim still holds. One that was given up for dead must not commit."""
        return self._steps[key].fence == fence

    def end(self, key: str, fence: int, *, committed: bool = False, failure: StepFailure | None = None) -> None:
        """End a claim: the step is committed, has failed, or is free for the next who wants it."""
        step = self._steps[key]
        if step.fence == fence:
            step.fence, step.committed, step.failure = None, committed, failure
            step.announce()
