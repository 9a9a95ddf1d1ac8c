"""Which replica answers a request: the one that has the turns before in its cache, else the least busy of two."""

from __future__ import annotations

from typing import Any

from ray.serve._private.request_router import PowerOfTwoChoicesRequestRouter
from ray.serve._private.request_router.request_router import RequestRouter

__all__ = ["AFFINITY", "AffinityRouter"]

AFFINITY = f"{__name__}.AffinityRouter"


class AffinityRouter(PowerOfTwoChoicesRequestRouter):  # type: ignore[misc]
    """Serve's router for handles whose ``session_id`` is a replica's id; one that is gone is as good as none."""

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        """The replica that the request asks for, or what Serve chooses."""
        wanted = pending_request.metadata.session_id if pending_request is not None else ""
        found = [replica for replica in candidate_replicas if wanted and replica.replica_id.unique_id == wanted]
        return [found] if found else await super().choose_replicas(candidate_replicas, pending_request)

    def _fulfill_next_pending_request(self, replica: Any, request_metadata: Any = None) -> None:
        """Give a replica to the request that it was chosen for: first come first served would give it to another."""
        RequestRouter._fulfill_next_pending_request(self, replica, request_metadata)
