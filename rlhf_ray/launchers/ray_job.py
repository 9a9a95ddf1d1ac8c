"""A job of a Ray cluster, from submission to its last line of log."""

from __future__ import annotations

import asyncio
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, TextIO
from urllib.parse import urlsplit

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from rlhf_ray.errors import ConfigError, RLHFRayError

__all__ = ["RayJob"]

_PROBE_TIMEOUT_S = 10.0
_POLL_INTERVAL_S = 0.5
_STATUS_ATTEMPTS = 60
# Overrides whatever address JobSubmissionClient is given.
_OVERRIDING_VARIABLE = "RAY_API_SERVER_ADDRESS"
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
        try:
            with _variable(_OVERRIDING_VARIABLE, address):
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
            asyncio.run(self._copy_log(out))
            return self._exit_code()
        except KeyboardInterrupt:
            self._stop(stop_timeout_s)
            raise

    async def _copy_log(self, out: TextIO) -> None:
        shown = 0
        while True:
            # A connection that was lost starts again at the first line.
            skip = shown
            try:
                async for text in self.client.tail_job_logs(self.job_id):
                    new = text[skip:]
                    skip = max(0, skip - len(text))
                    shown += len(new)
                    out.write(new)
                    out.flush()
            except (OSError, RuntimeError, aiohttp.ClientError) as error:
                sys.stderr.write(f"the log broke off ({_first_line(error)}); trying again\n")
            if self._status().is_terminal():
                return
            await asyncio.sleep(_POLL_INTERVAL_S)

    def _status(self) -> JobStatus:
        """Ask for the status; a busy or briefly unreachable head is asked again.

        Raises:
            RLHFRayError: It stays away.
        """
        for _ in range(_STATUS_ATTEMPTS):
            try:
                return self.client.get_job_status(self.job_id)
            except (OSError, RuntimeError) as error:
                last = error
            time.sleep(_POLL_INTERVAL_S)
        raise RLHFRayError(f"the Ray job server {self.address} does not answer any more: {_first_line(last)}") from last

    def _exit_code(self) -> int:
        details = self.client.get_job_info(self.job_id)
        if details.status == JobStatus.SUCCEEDED:
            return 0
        sys.stderr.write(f"{self.job_id} {details.status.value.lower()}: {(details.message or '').strip()}\n")
        if details.status == JobStatus.STOPPED:
            return _SIGTERM_EXIT_CODE
        code = details.driver_exit_code
        return code if code is not None and 0 < code < 256 else 1

    def _stop(self, timeout_s: float) -> None:
        sys.stderr.write(f"stopping {self.job_id}; Ctrl-C again leaves it to itself\n{self.how_to_look()}\n")
        try:
            self.client.stop_job(self.job_id)
            deadline = time.monotonic() + timeout_s
            while not (status := self._status()).is_terminal():
                if time.monotonic() > deadline:
                    sys.stderr.write(f"{self.job_id} has not ended after {timeout_s:g} s\n")
                    return
                time.sleep(_POLL_INTERVAL_S)
        except (OSError, RuntimeError) as error:
            sys.stderr.write(f"the cluster could not be asked to stop it: {_first_line(error)}\n")
            return
        sys.stderr.write(f"{self.job_id} {status.value.lower()}\n")


def _probe(address: str) -> None:
    """Knock, with a time limit: Ray's own requests have none.

    Raises:
        ConfigError: Nobody is there.
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


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
