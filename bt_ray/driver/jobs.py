"""Sweeps as jobs of a Ray cluster: submitted to its dashboard over HTTP, followed from anywhere, stopped on demand."""

import asyncio
import logging
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from aiohttp import ClientError
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_fixed

from bt_ray.errors import ConfigError, InfrastructureError

AGAIN_S = 2.0
"""Seconds between two attempts to follow a job whose connection was lost, and two looks at one that is to stop."""
LOST = (RuntimeError, OSError, ClientError)
"""What Ray's client raises, with requests and aiohttp below it, when a connection or a request is lost."""
AGAIN = Retrying(retry=retry_if_exception_type(LOST), wait=wait_fixed(AGAIN_S), stop=stop_after_attempt(30), reraise=True)
JOB_ENVIRONMENT = {"RAY_JOB_STOP_WAIT_TIME_S": "30"}
"""A job that is stopped gets the time to end its servers and to say what it is doing in the run directory."""


def sweep_command(file: Path, options: Sequence[str]) -> tuple[str, Path]:
    """A job's command line that runs a sweep, and the folder that travels with it.

    Args:
        file: The sweep's TOML. The current directory travels if that is in it, else its own folder.
        options: Those of `bt-ray sweep`.
    """
    file, folder = file.resolve(), Path.cwd()
    if not file.is_relative_to(folder):
        folder = file.parent
    return shlex.join(["bt-ray", "sweep", str(file.relative_to(folder)), *options]), folder


class Jobs:
    """The jobs of a cluster.

    Args:
        address: Of its dashboard, `http://host:8265`. Default: RAY_API_SERVER_ADDRESS or RAY_ADDRESS.

    Raises:
        ConfigError: It does not answer, or refuses this machine's token.
    """

    def __init__(self, address: str | None) -> None:
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        logging.getLogger("ray").setLevel(logging.WARNING)  # it tells of every file that it packs
        try:
            self._client = JobSubmissionClient(address)
        except AuthenticationError as error:
            raise ConfigError(
                f"{address or 'the cluster'} wants another token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
                f"RAY_AUTH_TOKEN_PATH. {str(error).strip().partition(chr(10))[0]}"
            ) from None
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"No jobs can be submitted to {address or 'a cluster'}: {error} Give the dashboard's address, as in "
                "--address http://host:8265."
            ) from None
        self.address: str = self._client.get_address()

    def submit(self, command: str, working_dir: Path) -> str:
        """Submit a command with a folder, less what its .gitignore names; returns the job's id.

        Raises:
            InfrastructureError: The folder cannot be packed, or the cluster does not take it.
        """
        try:
            job: str = self._client.submit_job(
                entrypoint=command, runtime_env={"working_dir": str(working_dir), "env_vars": JOB_ENVIRONMENT}
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise InfrastructureError(f"The job was not submitted: {error}") from None
        return job

    def follow(self, job: str, write: Callable[[str], None]) -> int:
        """Write what a job says until it ends, whatever becomes of the connection meanwhile; returns its exit code.

        Raises:
            ConfigError: There is no such job.
            InfrastructureError: The cluster is gone, or the job was ended before it had an exit code.
        """
        log = _Log(write)
        try:
            while not (info := AGAIN(self._info, job)).status.is_terminal():
                try:
                    asyncio.run(self._tail(job, log))
                except LOST:
                    time.sleep(AGAIN_S)  # the next look says whether the cluster is gone
            log.add(0, AGAIN(self._client.get_job_logs, job))
        except LOST as error:
            raise InfrastructureError(f"The cluster does not answer any more: {error}") from None
        return _exit_code(job, info)

    def _info(self, job: str) -> Any:
        try:
            return self._client.get_job_info(job)
        except RuntimeError as error:
            if "does not exist" in str(error):
                raise ConfigError(f"{self.address} has no job {job}.") from None
            raise

    async def _tail(self, job: str, log: "_Log") -> None:
        seen = 0
        async for lines in self._client.tail_job_logs(job):  # from its beginning, each time
            log.add(seen, lines)
            seen += len(lines)

    def stop(self, job: str) -> None:
        """Stop a job, and wait until it has."""
        self._client.stop_job(job)
        while not self._client.get_job_status(job).is_terminal():
            time.sleep(AGAIN_S)


class _Log:
    """A job's log, of which each character is written once."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._written = 0

    def add(self, start: int, text: str) -> None:
        """Take what stands in the log from its character `start` on."""
        if new := text[max(0, self._written - start) :]:
            self._write(new)
            self._written = start + len(text)


def _exit_code(job: str, info: Any) -> int:
    if info.driver_exit_code is not None:
        return int(info.driver_exit_code)
    if info.status == "SUCCEEDED":
        return 0
    raise InfrastructureError(f"The job {job} ended as {info.status}: {info.message}")
