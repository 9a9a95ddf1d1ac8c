from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from rlhf_ray.errors import RewardError
from rlhf_ray.rewards.reward_model.requests import Request, RequestQueue
from rlhf_ray.types import RewardFailure, RolloutGroup

GroupOf = Callable[..., RolloutGroup]


def taken(queue: RequestQueue, max_tokens: int) -> list[int]:
    return [request.group.group_id for request in queue.take(max_tokens) or []]


@pytest.fixture
def queue(group_of: GroupOf) -> RequestQueue:
    """Groups 0 to 4 of one completion each: 10 letters, EOS and one token of the prompt."""
    queue = RequestQueue()
    for number in range(5):
        queue.put(Request(group_of(["abcdefghij"], group_id=number)))
    return queue


def test_a_call_is_filled_oldest_first(queue: RequestQueue) -> None:
    assert taken(queue, 24) == [0, 1]
    assert taken(queue, 1) == [2]
    assert taken(queue, 1000) == [3, 4]


def test_groups_whose_call_ended_badly_go_first_and_alone(queue: RequestQueue) -> None:
    first = queue.take(24)
    assert first is not None
    queue.put_back(first)
    assert [taken(queue, 1000) for _ in range(3)] == [[0], [1], [2, 3, 4]]


def test_a_group_that_nobody_waits_for_is_left_out(queue: RequestQueue) -> None:
    requests = queue.take(1000)
    assert requests is not None
    requests[1].outcome.cancel()
    for request in requests:
        queue.put(request)
    assert taken(queue, 1000) == [0, 2, 3, 4]
    requests[1].tell(RewardFailure(group_id=1, kind="raised", message="too late"))


def test_who_takes_waits_for_a_group_or_the_end(group_of: GroupOf) -> None:
    queue = RequestQueue()
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(taken, queue, 10) for _ in range(2)]
        queue.put(Request(group_of(group_id=7)))
        threading.Timer(0.05, queue.close, ["the end"]).start()
        assert sorted(future.result(timeout=5) for future in waiting) == [[], [7]]


def test_the_end_fails_those_that_wait_and_those_that_come(queue: RequestQueue, group_of: GroupOf) -> None:
    in_flight = queue.take(1)
    late = Request(group_of(group_id=9))
    queue.close("the end")
    queue.close("another")
    with pytest.raises(RewardError, match="the end"):
        queue.put(late)
    assert in_flight is not None
    queue.put_back(in_flight)
    with pytest.raises(RewardError, match="the end"):
        in_flight[0].outcome.result(timeout=0)
    assert queue.take(1) is None
