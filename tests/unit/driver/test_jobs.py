"""A job is followed to its end through lost connections, and each character of its log is shown once."""

from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from aiohttp import ServerDisconnectedError
from ray.job_submission import JobStatus

from bt_ray.driver import jobs
from bt_ray.driver.jobs import Jobs, sweep_command
from bt_ray.errors import InfrastructureError

LOG = "checking\nplacing\nrunning\ndone\n"


class Dashboard:
    """Ray's client, of a cluster whose connections end early; after `refusals` in a row requests get through again."""

    def __init__(self, refusals: int = 0) -> None:
        self.refusals = refusals
        self.connections = 0

    def get_job_info(self, job: str) -> SimpleNamespace:
        if self.refusals:
            self.refusals -= 1
            raise ConnectionError("refused")
        ended = self.connections >= 3
        return SimpleNamespace(
            status=JobStatus.FAILED if ended else JobStatus.RUNNING, driver_exit_code=3 if ended else None
        )

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        self.connections += 1
        for at in range(0, 7 * self.connections, 5):
            yield LOG[at : at + 5]
        if self.connections < 3:
            raise ServerDisconnectedError

    def get_job_logs(self, job: str) -> str:
        return LOG


@pytest.fixture
def followed(monkeypatch: pytest.MonkeyPatch) -> Jobs:
    monkeypatch.setattr(jobs, "AGAIN_S", 0)
    monkeypatch.setattr(jobs, "AGAIN", jobs.AGAIN.copy(sleep=lambda seconds: None))
    made = Jobs.__new__(Jobs)
    made.address = "http://head:8265"
    return made


def test_a_log_is_shown_once_whatever_becomes_of_the_connection(followed: Jobs) -> None:
    followed._client = Dashboard(refusals=5)
    shown: list[str] = []
    assert followed.follow("raysubmit_1", shown.append) == 3, "the job's own exit code"
    assert "".join(shown) == LOG


def test_a_cluster_that_is_gone_is_told(followed: Jobs) -> None:
    followed._client = Dashboard(refusals=1000)
    with pytest.raises(InfrastructureError, match="The cluster does not answer any more: refused"):
        followed.follow("raysubmit_1", lambda text: None)


def test_the_current_folder_travels_or_that_of_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert sweep_command(Path("my/sweep.toml"), ["--strategy", "p -> w"]) == (
        "bt-ray sweep my/sweep.toml --strategy 'p -> w'",
        tmp_path,
    )
    assert sweep_command(tmp_path.parent / "other" / "sweep.toml", []) == (
        "bt-ray sweep sweep.toml",
        tmp_path.parent / "other",
    )
