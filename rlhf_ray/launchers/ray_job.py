"""A job of a Ray cluster, from submission to its last line of log."""

from __future__ import annotations

import asyncio
import os
import shlex
import socket
import time
from dataclasses import dataclass
from typing import Any, Self, TextIO
from urllib.parse import urlsplit

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from rlhf_ray.command import say
from rlhf_ray.errors import ConfigError, RLHFRayError

__all__ = ["RayJob"]

_PROBE_TIMEOUT_S = 10.0
_POLL_INTERVAL_S = 0.5
_ATTEMPTS = 60
_SIGTERM_EXIT_CODE = 143


@dataclass(frozen=True, slots=True, kw_only=True)
class RayJob:
    """A submitted job."""

    client: JobSubmissionClient
    job_id: str
    address: str

    @classmethod
    def submit(cls, address: str, *, entrypoint: str, runtime_env: dict[str, Any]) -> Self:
        """Upload what the job needs and submit it.

        Args:
            address: Job server, such as ``http://head:8265``, or a cluster's address.
            entrypoint: Shell command of the job.
            runtime_env: Ray's runtime environment of the job.

        Raises:
            ConfigError: Nothing answers at ``address``, it asks for a token, or the cluster refuses the job.
            RLHFRayError: The connection is lost on the way.
        """
        _probe(address)
        # It would override whatever address the client is given.
        os.environ.pop("RAY_API_SERVER_ADDRESS", None)
        try:
            client = JobSubmissionClient(address)
        except AuthenticationError as error:
            remedy = (
                "it asks for a token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN unless the cluster's token is the "
                "one in ~/.ray/auth_token"
            )
            raise ConfigError("--address", address, remedy) from error
        except Exception as error:  # Ray raises anything from ConnectionError to JSONDecodeError here.
            raise ConfigError("--address", address, f"no Ray job server answers there: {_first_line(error)}") from error
        try:
            job_id = client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env)
        except (RuntimeError, ValueError) as error:
            raise ConfigError("launch ray", address, f"the job cannot be submitted: {error}") from error
        except OSError as error:
            seen = f"`ray job list --address {shlex.quote(address)}` shows whether the job is there"
            raise RLHFRayError(f"the job server broke off the submission ({_first_line(error)}); {seen}") from error
        return cls(client=client, job_id=job_id, address=address)

    def how_to_look(self) -> str:
        """Say which commands show and end the job."""
        at = f"--address {shlex.quote(self.address)} {self.job_id}"
        return f"  ray job logs --follow {at}\n  ray job status {at}\n  ray job stop {at}"

    def follow(self, out: TextIO, *, stop_timeout_s: float) -> int:
        """Copy the job's log until it ends; Ctrl-C and SIGTERM stop the job.

        Args:
            out: Where the log goes.
            stop_timeout_s: How long to wait for the end of a job that was asked to stop.

        Returns:
            The job's exit code.

        Raises:
            RLHFRayError: The job server does not answer any more.
        """
        try:
            job = asyncio.run(self._copied_log(out))
        except KeyboardInterrupt:
            self._stop(stop_timeout_s)
            raise
        if job.status == JobStatus.SUCCEEDED:
            return 0
        say(f"{self.job_id} {job.status.value.lower()}: {(job.message or '').strip()}")
        if job.status == JobStatus.STOPPED:
            return _SIGTERM_EXIT_CODE
        code = job.driver_exit_code
        return code if code is not None and 0 < code < 256 else 1

    async def _copied_log(self, out: TextIO) -> JobDetails:
        """Copy the log to its end. A connection that was lost starts again at the first line, as ``ray job logs``."""
        shown = 0
        while True:
            skip = shown
            try:
                async for text in self.client.tail_job_logs(self.job_id):
                    new = text[skip:]
                    skip = max(0, skip - len(text))
                    shown += len(new)
                    out.write(new)
                    out.flush()
            except (OSError, RuntimeError, aiohttp.ClientError) as error:
                say(f"the log broke off ({_first_line(error)}); trying again")
            if (job := self._details()).status.is_terminal():
                return job
            await asyncio.sleep(_POLL_INTERVAL_S)

    def _details(self) -> JobDetails:
        """Ask for status and exit code; a busy or briefly unreachable head is asked again.

        Raises:
            RLHFRayError: It stays away.
        """
        for _ in range(_ATTEMPTS):
            try:
                return self.client.get_job_info(self.job_id)
            except (OSError, RuntimeError) as error:
                last = error
            time.sleep(_POLL_INTERVAL_S)
        remedy = f"the Ray job server {self.address} does not answer any more: {_first_line(last)}"
        raise RLHFRayError(remedy) from last

    def _stop(self, timeout_s: float) -> None:
        say(f"stopping {self.job_id}; Ctrl-C again leaves it to itself\n{self.how_to_look()}")
        try:
            self.client.stop_job(self.job_id)
        except (OSError, RuntimeError) as error:
            say(f"the cluster could not be asked to stop it: {_first_line(error)}")
            return
        deadline = time.monotonic() + timeout_s
        while not (status := self._details().status).is_terminal():
            if time.monotonic() > deadline:
                say(f"{self.job_id} has not ended after {timeout_s:g} s")
                return
            time.sleep(_POLL_INTERVAL_S)
        say(f"{self.job_id} {status.value.lower()}")


def _probe(address: str) -> None:
    """Connect once, with a time limit: Ray's own requests have none.

    Raises:
        ConfigError: Nothing answers there.
    """
    url = urlsplit(address)
    if url.scheme not in ("http", "https"):
        return
    try:
        port = url.port or (443 if url.scheme == "https" else 80)
        socket.create_connection((url.hostname or "", port), timeout=_PROBE_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        remedy = f"no Ray job server answers there ({_first_line(error)}); give the address of the cluster's dashboard"
        raise ConfigError("--address", address, remedy) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
