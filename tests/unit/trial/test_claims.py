"""Claims and commits under concurrent writers, of which some die and some wake up late: laws that hold for every order."""

import asyncio
import secrets
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.made_sweep import STEP

from bt_ray.run_dir.results import StepFailure
from bt_ray.run_dir.step_store import StepStore, attempt_name
from bt_ray.run_dir.storage import Directory, Storage, open_storage
from bt_ray.trial.claims import ClaimTable

KEYS = ["a", "b", "c"]
WORKERS = range(4)
FAILED = StepFailure("it failed", "where")


class Claiming(RuleBasedStateMachine):
    """Workers claim, compute, commit, fail and die, in any order; a dead one may turn out to be merely slow."""

    storage: Storage

    def __init__(self) -> None:
        super().__init__()
        self.temporary = tempfile.TemporaryDirectory()
        self.store = StepStore(self.storage_of_one_run())
        self.table = ClaimTable(set(), first_fence=1)
        self.at_work: dict[int, tuple[str, int]] = {}
        self.slow: list[tuple[str, int]] = []
        self.written: dict[str, list[int]] = {key: [] for key in KEYS}
        self.ended: dict[str, bool | StepFailure] = {}
        self.fences: list[int] = []

    def storage_of_one_run(self) -> Storage:
        return Directory(Path(self.temporary.name))

    def teardown(self) -> None:
        self.temporary.cleanup()

    @rule(worker=st.sampled_from(WORKERS), key=st.sampled_from(KEYS))
    def claim(self, worker: int, key: str) -> None:
        if worker in self.at_work:
            return
        granted = self.table.try_claim(key)
        if key in self.ended:
            assert granted == self.ended[key]
        elif any(claimed == key for claimed, _ in self.at_work.values()):
            assert granted is False
        else:
            assert isinstance(granted, int)
            assert not isinstance(granted, bool)
            self.fences.append(granted)
            self.at_work[worker] = key, granted

    @precondition(lambda self: self.at_work)
    @rule(data=st.data(), how=st.sampled_from(["commit", "fail", "die", "late"]))
    def end(self, data: st.DataObject, how: str) -> None:
        key, fence = self.at_work.pop(data.draw(st.sampled_from(sorted(self.at_work))))
        assert self.table.may_commit(key, fence)
        if how == "late":  # it may commit, it is given up for dead, and then it writes all the same
            self.slow.append((key, fence))
        if how == "commit":
            self.write(key, fence)
        self.table.end(key, fence, committed=how == "commit", failure=FAILED if how == "fail" else None)
        if how in ("commit", "fail"):
            self.ended[key] = True if how == "commit" else FAILED

    @precondition(lambda self: self.slow)
    @rule(data=st.data(), writes=st.booleans())
    def wake_up(self, data: st.DataObject, writes: bool) -> None:
        key, fence = self.slow.pop(data.draw(st.integers(0, len(self.slow) - 1)))
        assert not self.table.may_commit(key, fence), "whoever asks now is refused"
        if writes:
            self.write(key, fence)
        self.table.end(key, fence, committed=True)  # it tells nobody anything

    def write(self, key: str, fence: int) -> None:
        attempt = attempt_name(fence)
        program = self.store.write_program(key, attempt, b"{}")
        self.store.commit(replace(STEP, key=key, score=float(fence), program=program), attempt)
        self.written[key].append(fence)

    @invariant()
    def the_latest_claim_that_was_written_counts(self) -> None:
        for key in KEYS:
            found = self.store.read(key)
            assert (found and found.score) == (max(self.written[key]) if self.written[key] else None)

    @invariant()
    def no_two_work_at_one_step_and_no_number_comes_twice(self) -> None:
        claimed = [key for key, _ in self.at_work.values()]
        assert len(set(claimed)) == len(claimed)
        assert self.fences == sorted(set(self.fences))


class ClaimingOnObjects(Claiming):
    def storage_of_one_run(self) -> Storage:
        return open_storage(f"s3://bucket/{secrets.token_hex(8)}")


TestClaims = Claiming.TestCase
TestClaims.settings = settings(max_examples=60, stateful_step_count=30)


@pytest.mark.usefixtures("s3")
class TestClaimsOnObjects(ClaimingOnObjects.TestCase):  # type: ignore[misc, name-defined]
    settings = settings(max_examples=8, stateful_step_count=15)


def test_whoever_waits_takes_over_at_once() -> None:
    async def waits() -> list[int | bool | StepFailure]:
        table, got = ClaimTable(set(), first_fence=5), []

        async def claim() -> None:
            while (granted := table.try_claim("k")) is False:
                await table.wait_for_change("k")
            got.append(granted)

        first = table.try_claim("k")
        assert first == 5
        waiting = [asyncio.create_task(claim()) for _ in range(3)]
        await asyncio.sleep(0)
        assert got == []
        table.end("k", 5)  # it died
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert got == [6], "one of them, and no other"
        table.end("k", 6, committed=True)
        await asyncio.gather(*waiting)
        return got

    assert asyncio.run(waits()) == [6, True, True]


def test_commits_at_the_same_time_leave_the_latest(storage: Storage) -> None:
    store = StepStore(storage)
    seen: list[float | None] = []

    def commit(fence: int) -> None:
        attempt = attempt_name(fence)
        program = store.write_program("k", attempt, b"{}" + b" " * 100_000)
        store.commit(replace(STEP, score=float(fence), program=program), attempt)
        found = store.read("k")
        seen.append(found and found.score)

    threads = [threading.Thread(target=commit, args=(fence,)) for fence in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = store.read("k")
    assert found is not None
    assert found.score == 11.0
    assert all(score is not None for score in seen), "a commit is seen by whoever made it"
