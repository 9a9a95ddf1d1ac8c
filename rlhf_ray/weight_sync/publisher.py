"""Publishes the learners' policy to every replica and checks what they acknowledge.

Consumes an updated policy; produces replicas that all serve the new version. Between CPUs the buckets go through the
object store and shared memory; between GPUs the learners send them, over NCCL (nccl.py) or within each that they share
with a replica (ipc.py).
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from rlhf_ray.errors import WeightSyncError
from rlhf_ray.types import LoadReport
from rlhf_ray.weight_sync.manifest import ReplicaFailure, WeightManifest

__all__ = ["DirectPublisher", "ObjectStorePublisher", "SyncResult", "WeightPublisher", "checked_pause"]

_LOG = logging.getLogger(__name__)
_TIMEOUT_S = 600.0
_RETRY_PAUSE_S = 0.5
_MOST_TRIES = 3
_NUMBER = re.compile(r"0x[0-9a-f]+|\d+")


class WeightSource(Protocol):
    """What a publisher needs of the learner group."""

    def publish(self) -> tuple[WeightManifest, list[Any]]:
        """Gather the policy into the object store."""
        ...

    def stage(self) -> None:
        """Have what comes next at hand for :meth:`send`, where learners and replicas take turns."""
        ...

    def send(self, replica_ids: tuple[str, ...]) -> int | None:
        """Send the policy to the replicas; its size in bytes, ``None`` where the learners died meanwhile."""
        ...

    def take_replica_failures(self) -> list[ReplicaFailure]:
        """Why replicas could not load weights, since the last call."""
        ...

    def restore_restarted_ranks(self) -> None:
        """See to it that replicas which start can have their weights; called while they are waited for."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncResult:
    """What one publication did."""

    version: int
    size_bytes: int
    pause_s: float
    """Longest time a replica's generation stood still."""
    replica_ids: frozenset[str]
    """Replicas that acknowledged; one that is starting pulls the version itself."""
    publication_s: float
    """From the end of the update until all had."""


class WeightPublisher(Protocol):
    """Brings a version to every replica."""

    def gather(self, version: int) -> Callable[[], SyncResult]:
        """Take the learners' current policy, which is ``version``; the call that is returned brings it to the replicas.

        Either raises:
            WeightSyncError: A replica failed to load it, or acknowledged another version.
        """
        ...


class _Publisher:
    """Asks the replicas, for both ways of publication.

    Args:
        source: The learner group.
        handle: The rollout app's Serve handle.
    """

    def __init__(self, *, source: WeightSource, handle: Any) -> None:
        self._source = source
        self._handle = handle
        self._failures = _Failures(source, 0)

    def _ask_all(self, method: str, *arguments: Any) -> list[LoadReport | BaseException]:
        """Call all running replicas; where none is, because all died, wait for Serve to start one.

        Raises:
            WeightSyncError: They did not answer in time, or those that start fail with the error that ended others.
            LearnerError: The learners cannot give a replica that starts its weights.
        """
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import DeploymentUnavailableError

        ends_at = time.monotonic() + _TIMEOUT_S
        while time.monotonic() < ends_at:
            try:
                answers = self._handle.broadcast(method, *arguments).results(
                    timeout_s=_TIMEOUT_S, return_exceptions=True
                )
            except TimeoutError:
                break
            except DeploymentUnavailableError:
                answers = []
            if not all(isinstance(answer, RayActorError) for answer in answers):
                return list(answers)
            self._source.restore_restarted_ranks()
            self._failures.look()
            time.sleep(_RETRY_PAUSE_S)
        raise WeightSyncError(f"the replicas did not answer {method} within {_TIMEOUT_S:g} s{self._failures.told()}")


class _Failures:
    """What replicas say of a publication that fails: a death is made good by another replica, a defect is not.

    Args:
        source: The learner group.
        version: The policy version that is published.
    """

    def __init__(self, source: WeightSource, version: int) -> None:
        self._source = source
        self._version = version
        self._in_this_try: set[str] = set()
        self._before: set[str] = set()
        self._newest: ReplicaFailure | None = None

    def look(self) -> None:
        """Hear what was told since the last call.

        Raises:
            WeightSyncError: A try before failed for the same reason, or did a replica that one now takes the place of.
        """
        for failure in self._source.take_replica_failures():
            self._newest = failure
            # Addresses and sizes differ from one process to the next.
            reason = _NUMBER.sub("#", failure.message)
            if reason in self._before or (failure.is_new and reason in self._in_this_try):
                raise WeightSyncError(
                    f"policy version {self._version} cannot be loaded: {failure.told_by} failed like another one "
                    f"before it: {failure.message}"
                )
            self._in_this_try.add(reason)

    def next_try(self) -> None:
        """Look, and begin another try: what failed until now must not fail again."""
        self.look()
        self._before |= self._in_this_try
        self._in_this_try = set()

    def warn(self) -> None:
        """Log what was told since the last call: the others have the weights, and Serve replaces who has not."""
        for failure in self._source.take_replica_failures():
            _LOG.warning("%s could not load policy weights: %s", failure.told_by, failure.message)

    def told(self) -> str:
        """The newest failure, for the end of a sentence."""
        return "" if self._newest is None else f"; {self._newest.told_by}: {self._newest.message}"


class ObjectStorePublisher(_Publisher):
    """Publication through the object store and shared memory; what is gathered needs no learner any more.

    Args:
        source: The learner group.
        handle: The rollout app's Serve handle.
        max_paused: Replicas that load at the same time; ``None``: all.
    """

    def __init__(self, *, source: WeightSource, handle: Any, max_paused: int | None = None) -> None:
        super().__init__(source=source, handle=handle)
        self._max_paused = max_paused

    def gather(self, version: int) -> Callable[[], SyncResult]:
        """See :meth:`WeightPublisher.gather`."""
        started = time.perf_counter()
        manifest, refs = self._source.publish()
        if manifest.version != version:
            raise WeightSyncError(f"the learners published version {manifest.version} where {version} was due")
        return lambda: self._deliver(manifest, refs, started)

    def _deliver(self, manifest: WeightManifest, refs: list[Any], started: float) -> SyncResult:
        from ray.exceptions import ObjectLostError

        self._failures = _Failures(self._source, manifest.version)
        for part in self._parts():
            answers = self._ask_all("load_weights", manifest, refs, part)
        for _ in range(_MOST_TRIES):
            if not any(isinstance(answer, ObjectLostError) for answer in answers):
                break
            # The learner that had put them into the object store died; the next one has them again, or newer ones.
            manifest, refs = self._source.publish()
            answers = self._ask_all("load_weights", manifest, refs, None)
        pause_s = checked_pause(manifest.version, answers)
        self._failures.warn()
        return SyncResult(
            version=manifest.version,
            size_bytes=manifest.size_bytes,
            pause_s=pause_s,
            replica_ids=frozenset(report.replica_id for report in _reports(answers)),
            publication_s=time.perf_counter() - started,
        )

    def _parts(self) -> Iterator[frozenset[str] | None]:
        """Ids of the replicas that load together, part by part; ``None``: all that there are.

        The last part is always all: those that have loaded have nothing to do, and those that are new have not.
        """
        if self._max_paused is not None:
            replicas = sorted(report.replica_id for report in _reports(self._ask_all("status")))
            for first in range(0, len(replicas), self._max_paused):
                yield frozenset(replicas[first : first + self._max_paused])
        yield None


class DirectPublisher(_Publisher):
    """Publication from GPU to GPU, over NCCL or within each that is shared, which keeps the learners.

    A replica that died meanwhile is not in the new group.
    """

    def gather(self, version: int) -> Callable[[], SyncResult]:
        """See :meth:`WeightPublisher.gather`."""
        self._source.stage()
        return lambda: self._send(version)

    def _send(self, version: int) -> SyncResult:
        started = time.perf_counter()
        self._failures = _Failures(self._source, version)
        for _ in range(_MOST_TRIES):
            before = [report.replica_id for report in _reports(self._ask_all("status"))]
            size_bytes = self._source.send(tuple(sorted(before)))
            if size_bytes is not None:
                break
            self._failures.next_try()
            self._ask_all("abandon_update")
            self._source.stage()  # Those that come back have nothing at hand.
        else:
            deaths = f"learners or replicas died {_MOST_TRIES} times while version {version} was sent"
            raise WeightSyncError(deaths + self._failures.told())
        # One that has come since pulls the version itself.
        answers = [
            answer
            for answer in self._ask_all("status")
            if not isinstance(answer, LoadReport) or answer.replica_id in before
        ]
        pause_s = checked_pause(version, answers)
        self._failures.warn()
        return SyncResult(
            version=version,
            size_bytes=size_bytes,
            pause_s=pause_s,
            replica_ids=frozenset(report.replica_id for report in _reports(answers)),
            publication_s=time.perf_counter() - started,
        )


def checked_pause(version: int, answers: list[LoadReport | BaseException]) -> float:
    """Check that every answer acknowledges ``version``; returns the longest pause in seconds.

    A replica that died meanwhile is Serve's to replace, and the new one pulls the version itself; a live one that
    failed or serves something else is an error, and so is a pool in which no replica answered.

    Raises:
        WeightSyncError: As said.
    """
    from ray.exceptions import RayActorError

    reports = _reports(answers)
    failures = [a for a in answers if not isinstance(a, (LoadReport, RayActorError))]
    if failures:
        # Ray wraps what a replica raised, with the traceback; the cause says it shortly.
        cause = getattr(failures[0], "cause", None) or failures[0]
        raise WeightSyncError(f"a replica could not load policy version {version}: {cause!r}") from failures[0]
    if not reports:
        raise WeightSyncError(f"no replica acknowledged policy version {version}: none is running")
    wrong = [report for report in reports if report.version != version]
    if wrong:
        raise WeightSyncError(
            f"replica {wrong[0].replica_id} serves version {wrong[0].version} after version {version} was published"
        )
    return max(report.pause_s for report in reports)


def _reports(answers: list[LoadReport | BaseException]) -> list[LoadReport]:
    return [answer for answer in answers if isinstance(answer, LoadReport)]
