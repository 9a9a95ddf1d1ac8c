"""Stage 6 in time: one publication after the other, beside the learners' next batch where rollouts may be stale.

Replicas are called in a thread in any case: Serve's blocking calls refuse to work where an event loop runs, and in a
notebook one does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from rlhf_ray.weight_sync.publisher import Publication, Publisher

__all__ = ["Publications"]

_SETTLE_S = 10.0


class Publications:
    """Publishes policies in the order of their versions.

    Args:
        publisher: Brings a policy to the replicas.
        published: Called with a version as soon as every replica has it.
        beside_training: Whether replicas load a policy while the learners go on; the next publication waits for them.
    """

    def __init__(self, publisher: Publisher, *, published: Callable[[int], None], beside_training: bool) -> None:
        self._publisher = publisher
        self._published = published
        self._beside_training = beside_training
        self._thread = ThreadPoolExecutor(1, "publication")
        self._pending: Future[Publication] | None = None
        self._last: Publication | None = None
        self._gathered: tuple[int, Callable[[], Publication]] | None = None
        self._started = 0.0
        self.version: int | None = 0
        """The newest that was published or is on its way; none: it failed, and replicas differ."""
        self.held_up_s = 0.0
        """How long the last :meth:`publish` took, in seconds."""
        self._known: set[str] = set()
        self.new_replicas = 0
        """Replicas that acknowledged a publication and not the first one: Serve started them for others."""

    def publish(self, version: int, *, beside: bool = True) -> Publication:
        """Publish the learners' current policy, which is ``version``.

        Args:
            version: The policy's.
            beside: Whether replicas may load it beside training, if that is done at all.

        Returns:
            The last publication that every replica has acknowledged: this one, or beside training the one before.

        Raises:
            WeightSyncError: This one failed, or the one before did beside training.
        """
        self.gather(version)
        return self.deliver(beside=beside)

    def gather(self, version: int) -> None:
        """The learners' half of :meth:`publish`: take their current policy, which is ``version``."""
        self._started = time.perf_counter()
        self.version = None
        self._finished()
        self._gathered = version, self._publisher.gather(version)

    def deliver(self, *, beside: bool = True) -> Publication:
        """The replicas' half, for which the learners are not needed; as :meth:`publish`."""
        assert self._gathered is not None, "gather() comes first"
        (version, deliver), self._gathered = self._gathered, None
        last = self._last
        self._pending = self._thread.submit(self._deliver, deliver)
        if not (beside and self._beside_training) or last is None:
            last = self._finished()
        assert last is not None
        self.version = version
        self.held_up_s = time.perf_counter() - self._started
        return last

    def finish_interrupted(self) -> None:
        """Wait for a delivery whose wait was interrupted: in the learners' turn its replicas may not be awake.

        Raises:
            WeightSyncError: It failed.
        """
        if not self._beside_training:
            self._finished()

    def settle(self, timeout_s: float | None = None) -> None:
        """Wait for a publication that is on its way and of no use any more, whatever becomes of it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            wait([pending], timeout_s)

    def stop(self) -> None:
        """Wait some seconds for a publication that is on its way, and end the thread."""
        self.settle(_SETTLE_S)
        self._thread.shutdown(wait=False)

    def _finished(self) -> Publication | None:
        """The last publication, which is waited for; none: there was none."""
        if self._pending is not None:
            wait([self._pending])  # Not result(): where Ctrl-C ends this wait, settle() goes on with it.
            pending, self._pending = self._pending, None
            self._last = pending.result()
        return self._last

    def _deliver(self, deliver: Callable[[], Publication]) -> Publication:
        publication = deliver()
        if self._known:
            self.new_replicas += len(publication.replica_ids - self._known)
        self._known |= publication.replica_ids
        self._published(publication.version)
        return publication
