"""Rewards, in front of a reward model: the groups that wait for its actors."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field

from rlhf_ray.errors import RewardError
from rlhf_ray.rewards.scoring import Scores
from rlhf_ray.types import RewardFailure, RolloutGroup

__all__ = ["Request", "RequestQueue"]


@dataclass(slots=True, eq=False)
class Request:
    """A group that somebody waits for."""

    group: RolloutGroup
    outcome: Future[Scores | RewardFailure] = field(default_factory=Future)
    alone: bool = False
    """A call that it was part of ended badly: it is sent by itself, to know which group was to blame."""

    @property
    def num_tokens(self) -> int:
        """Tokens of its sequences, as the policy counts them."""
        prompt = len(self.group.prompt.token_ids)
        return sum(prompt + len(completion.token_ids) for completion in self.group.trajectories)

    def tell(self, outcome: Scores | RewardFailure | Exception) -> None:
        """Answer whoever waits; nobody does who gave up."""
        with suppress(InvalidStateError):
            if isinstance(outcome, Exception):
                self.outcome.set_exception(outcome)
            else:
                self.outcome.set_result(outcome)


class RequestQueue:
    """Groups in the order they came; any thread may use it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[Request] = deque()
        self._closed: str | None = None

    def put(self, request: Request) -> None:
        """Add a group.

        Raises:
            RewardError: The queue is closed.
        """
        with self._changed:
            if self._closed is not None:
                raise RewardError(self._closed)
            self._waiting.append(request)
            self._changed.notify()

    def put_back(self, requests: Sequence[Request]) -> None:
        """Put groups whose call ended badly to the front, each to be sent alone."""
        with self._changed:
            for request in reversed(requests):
                request.alone = True
                self._waiting.appendleft(request)
            self._fail_if_closed()
            self._changed.notify_all()

    def take(self, max_tokens: int) -> list[Request] | None:
        """Wait for groups and take the oldest: as many as have ``max_tokens`` in all, or one; ``None`` once closed."""
        with self._changed:
            while True:
                if self._closed is not None:
                    return None
                if batch := self._batch(max_tokens):
                    return batch
                self._changed.wait()

    def close(self, reason: str) -> None:
        """Fail every group that waits and all that come."""
        with self._changed:
            self._closed = self._closed or reason
            self._fail_if_closed()
            self._changed.notify_all()

    def _batch(self, max_tokens: int) -> list[Request]:
        batch: list[Request] = []
        tokens = 0
        while self._waiting:
            head = self._waiting[0]
            if not head.outcome.done():  # Else its caller gave up.
                tokens += head.num_tokens
                if batch and (tokens > max_tokens or head.alone):
                    break
                batch.append(head)
            self._waiting.popleft()
            if batch and batch[-1].alone:
                break
        return batch

    def _fail_if_closed(self) -> None:
        if self._closed is not None:
            for request in self._waiting:
                request.tell(RewardError(self._closed))
            self._waiting.clear()
