"""Requests that name a replica reach it, on a real Serve application."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

from rlhf_ray.rollouts.affinity import AFFINITY

pytestmark = pytest.mark.usefixtures("cluster")

CALLS = 40


@pytest.fixture
def handle() -> Iterator[Any]:
    router = RequestRouterConfig(request_router_class=AFFINITY)

    @serve.deployment(
        num_replicas=2, ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=100, request_router_config=router
    )
    class Who:
        async def generate(self, pause_s: float = 0.0) -> Any:
            await asyncio.sleep(pause_s)
            yield serve.get_replica_context().replica_id.unique_id, os.getpid()

    yield serve.run(Who.bind(), name="affinity", route_prefix=None)
    serve.delete("affinity")
    serve.shutdown()


def ask(handle: Any, replica_id: str, count: int, pause_s: float = 0.0) -> list[tuple[str, int]]:
    """All at once."""
    chosen = handle.options(stream=True, session_id=replica_id) if replica_id else handle.options(stream=True)
    answers = [chosen.generate.remote(pause_s) for _ in range(count)]
    return [next(iter(answer)) for answer in answers]


def test_requests_stick_to_the_replica_that_they_name_and_others_are_spread(handle: Any) -> None:
    free = Counter(name for name, _ in ask(handle, "", CALLS, pause_s=0.2))
    assert len(free) == 2, "both are asked"
    for name in free:
        assert Counter(each for each, _ in ask(handle, name, CALLS)) == {name: CALLS}
    # Mixed, while others wait: each gets its own.
    first, second = free
    chosen = [handle.options(stream=True, session_id=name) for name in (first, second)]
    answers = [(name, one.generate.remote(0.1)) for _ in range(CALLS) for name, one in zip(free, chosen, strict=True)]
    assert all(next(iter(answer))[0] == name for name, answer in answers)
    assert first != second


def test_a_replica_that_is_gone_is_as_good_as_none(handle: Any) -> None:
    assert len({name for name, _ in ask(handle, "never there", CALLS, pause_s=0.2)}) == 2
    (name, process) = ask(handle, "", 1)[0]
    os.kill(process, 9)
    found: Counter[str] = Counter()
    for _ in range(10):
        try:
            found.update(each for each, _ in ask(handle, name, 1))
        except ray.exceptions.RayError:  # As the rollouter does: what was on its way is asked again.
            continue
    assert name not in found
    assert found.total() >= 8
