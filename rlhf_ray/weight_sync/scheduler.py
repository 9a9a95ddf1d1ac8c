"""When policies are published: one after the other, overlapping training where rollouts may be stale.

Replicas are called in a thread in any case: Serve's blocking calls refuse to work where an event loop runs, and in a
notebook one does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from rlhf_ray.weight_sync.publisher import SyncResult, WeightPublisher

__all__ = ["WeightSyncScheduler"]

_STOP_WAIT_S = 10.0


class WeightSyncScheduler:
    """Publishes policies in the order of their versions.

    Args:
        publisher: Brings a policy to the replicas.
        published: Called with a version as soon as every replica has it.
        overlaps_training: Whether replicas load a policy while the learners train; the next publication waits for them.
    """

    def __init__(
        self, publisher: WeightPublisher, *, published: Callable[[int], None], overlaps_training: bool
    ) -> None:
        self._publisher = publisher
        self._published = published
        self._overlaps_training = overlaps_training
        self._thread = ThreadPoolExecutor(1, "publication")
        self._pending: Future[SyncResult] | None = None
        self._last: SyncResult | None = None
        self._gathered: tuple[int, Callable[[], SyncResult]] | None = None
        self._started = 0.0
        self.version: int | None = 0
        """The newest that was published or is on its way; ``None``: it failed, and replicas differ."""
        self.blocked_s = 0.0
        """How long the last :meth:`publish` took, in seconds."""
        self._known: set[str] = set()
        self.new_replicas = 0
        """Replicas that acknowledged a publication and not the first one: Serve started them for others."""

    def publish(self, version: int, *, overlapping: bool = True) -> SyncResult:
        """Publish the learners' current policy, which is ``version``.

        Args:
            version: The policy's.
            overlapping: Whether replicas may load it while the learners train, if that is done at all.

        Returns:
            The last publication that every replica has acknowledged: this one, or the one before where this one
            overlaps training.

        Raises:
            WeightSyncError: This one failed, or the one before did in the background.
        """
        self.gather(version)
        return self.deliver(overlapping=overlapping)

    def gather(self, version: int) -> None:
        """The learners' half of :meth:`publish`: take their current policy, which is ``version``."""
        self._started = time.perf_counter()
        self.version = None
        self._finished()
        self._gathered = version, self._publisher.gather(version)

    def deliver(self, *, overlapping: bool = True) -> SyncResult:
        """The replicas' half, for which the learners are not needed; as :meth:`publish`."""
        assert self._gathered is not None, "gather() comes first"
        (version, deliver), self._gathered = self._gathered, None
        last = self._last
        self._pending = self._thread.submit(self._deliver, deliver)
        if not (overlapping and self._overlaps_training) or last is None:
            last = self._finished()
        assert last is not None
        self.version = version
        self.blocked_s = time.perf_counter() - self._started
        return last

    def finish_interrupted(self) -> None:
        """Wait for a delivery whose wait was interrupted: in the learners' turn its replicas may not be awake.

        Raises:
            WeightSyncError: It failed.
        """
        if not self._overlaps_training:
            self._finished()

    def wait_pending(self, timeout_s: float | None = None) -> None:
        """Wait for a publication that is on its way and no longer needed, whether it fails or not."""
        pending, self._pending = self._pending, None
        if pending is not None:
            wait([pending], timeout_s)

    def stop(self) -> None:
        """Wait some seconds for a publication that is on its way, and end the thread."""
        self.wait_pending(_STOP_WAIT_S)
        self._thread.shutdown(wait=False)

    def _finished(self) -> SyncResult | None:
        """The last publication, which is waited for; ``None``: there was none."""
        if self._pending is not None:
            wait([self._pending])  # Not result(): where Ctrl-C ends this wait, wait_pending() resumes it.
            pending, self._pending = self._pending, None
            self._last = pending.result()
        return self._last

    def _deliver(self, deliver: Callable[[], SyncResult]) -> SyncResult:
        publication = deliver()
        if self._known:
            self.new_replicas += len(publication.replica_ids - self._known)
        self._known |= publication.replica_ids
        self._published(publication.version)
        return publication
