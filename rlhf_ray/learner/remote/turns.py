"""Whose turn it is on GPUs that replicas and learners share: ranks come when every engine sleeps, and the reverse.

Engines and ranks say in long polls how they are and are told what to do next, so a bridge that was started again learns
it from them. An engine that is being built, falls asleep or wakes does not poll: a call that stays open says that it is
there, and Ray repeats that one too. The one rule: *a rank holds models on its GPU => every engine sleeps*. An engine is
taken for awake from the moment it is told to wake until it says that it sleeps, or is dead; a rank likewise. Plain
asyncio, below the bridge's condition.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

from rlhf_ray.errors import ConfigError

__all__ = ["LEARNER_SHARE", "REPLICA_SHARE", "Place", "Turns", "check_pairing"]

# Of a GPU. Placed first, no two replicas fit one GPU, and what each leaves is the best fit for a learner; Ray puts two
# halves of a kind together.
REPLICA_SHARE, LEARNER_SHARE = 0.51, 0.49

Place: TypeAlias = tuple[str, str]
"""Node id and GPU id; an empty GPU id on CPUs."""

_CHECK_S = 1.0
# For Ray to repeat the calls of engines that a bridge that was started again does not know yet.
_GRACE_S = 15.0


@dataclass(slots=True, kw_only=True)
class _Engine:
    actor: Any
    place: Place
    awake: bool
    ping: asyncio.Task[bool] | None = None


class Turns:
    """The engines' turn, unless a caller wants the learners'.

    Args:
        changed: Notified whenever something changes; methods that are not coroutines are called with it held.
        num_ranks: Learner ranks of a worker group.
        num_engines: Replicas.
        is_alive: Whether an engine's actor is alive; waits where that is not known yet.
        clock: Seconds.
    """

    def __init__(
        self,
        changed: asyncio.Condition,
        *,
        num_ranks: int,
        num_engines: int,
        is_alive: Callable[[Any], Awaitable[bool]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._changed = changed
        self._num_ranks = num_ranks
        self._num_engines = num_engines
        self._is_alive = is_alive or _answers
        self._clock = clock
        self._grace_ends = clock() + _GRACE_S
        self._wanted: set[str] = set()
        self.engines_load = False
        """Whether ranks send to engines, which must be awake for that: the learners' turn comes afterward."""
        self._given_back: set[str] = set()
        self._engines: dict[str, _Engine] = {}
        self._heard_of: set[str] = set()
        self._ranks: dict[int, bool] = {}
        self._rank_places: dict[int, Place] = {}

    async def hold(self, token: str) -> None:
        """Want the learners' turn until :meth:`give_back`; the call stays open, so that Ray repeats it if need be."""
        async with self._changed:
            if token not in self._given_back:
                self._wanted.add(token)
                self._changed.notify_all()
        while token not in self._given_back:
            await self._forget_dead()
            async with self._changed:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_CHECK_S):
                        await self._changed.wait_for(lambda: token in self._given_back)
                self._changed.notify_all()  # Time alone may have ended the grace.

    async def give_back(self, token: str) -> None:
        """End a :meth:`hold`."""
        async with self._changed:
            self._wanted.discard(token)
            self._given_back.add(token)
            self._changed.notify_all()

    async def wait_away(self) -> None:
        """Wait until all ranks have left, or the learners' turn is wanted again."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.is_wanted or self.ranks_are_away())

    async def attend(self, engine: str, *, actor: Any, place: Place) -> None:
        """Open call of an engine, as long as it lives: taken for awake until it says how it is."""
        async with self._changed:
            self._engines.setdefault(engine, _Engine(actor=actor, place=place, awake=True))
            self._heard_of.add(engine)
            self._changed.notify_all()
            await self._changed.wait_for(lambda: engine not in self._engines)

    async def follow(self, engine: str, *, awake: bool, actor: Any, place: Place, timeout_s: float) -> bool | None:
        """Long poll of an engine that says how it is: whether it must be awake, once that changes; ``None``: not yet.

        One that is not built yet is asleep, and waits here for its turn to be built.
        """
        async with self._changed:
            state = self._engines[engine] = _Engine(actor=actor, place=place, awake=awake)
            self._heard_of.add(engine)
            self._changed.notify_all()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait_for(lambda: self.is_wanted if awake else self.ranks_are_away())
            except TimeoutError:
                return None
            if not awake:
                state.awake = True
            return not awake

    def forget_engines(self) -> None:
        """The run ends."""
        self._engines.clear()

    def begin_group(self) -> None:
        """Another worker group is in the place of the one before, whose processes have ended."""
        self._ranks.clear()
        self._rank_places.clear()

    def rank_says(self, rank: int, *, resident: bool, place: Place | None = None) -> None:
        """A rank says whether it holds models on its GPU."""
        self._ranks[rank] = resident
        if place is not None:
            self._rank_places[rank] = place
        self._changed.notify_all()

    def must_leave(self, rank: int) -> bool:
        """Whether a rank holds models in the engines' turn."""
        return self._ranks.get(rank, False) and not self.is_wanted

    @property
    def is_wanted(self) -> bool:
        """Whether it is the learners' turn, or will be as soon as the engines sleep."""
        return bool(self._wanted) and not self.engines_load

    def engines_sleep(self) -> bool:
        """Whether a rank may come: no engine is awake, as far as can be known."""
        all_known = len(self._heard_of) >= self._num_engines or self._clock() > self._grace_ends
        return all_known and not any(engine.awake for engine in self._engines.values())

    def ranks_are_away(self) -> bool:
        """Whether it is the engines' turn, and no rank is on its GPU any more."""
        return not self.is_wanted and len(self._ranks) == self._num_ranks and not any(self._ranks.values())

    async def places(self) -> tuple[dict[str, Place], dict[int, Place]]:
        """Where engines and ranks are."""
        await self._forget_dead(asleep=True)
        return {name: engine.place for name, engine in self._engines.items()}, dict(self._rank_places)

    async def _forget_dead(self, *, asleep: bool = False) -> None:
        """Forget engines that died: the learners would wait for ever for one that was awake."""
        pings = {}
        for name, engine in self._engines.items():
            if engine.awake or asleep:
                engine.ping = engine.ping or asyncio.ensure_future(self._is_alive(engine.actor))
                pings[name] = engine.ping
        if pings:
            # One that is busy with its own start does not answer, and is alive.
            await asyncio.wait(pings.values(), timeout=_CHECK_S)
        async with self._changed:
            for name, ping in pings.items():
                engine_now = self._engines.get(name)
                if ping.done() and engine_now is not None and engine_now.ping is ping:
                    engine_now.ping = None
                    if not ping.result():
                        del self._engines[name]
                        self._changed.notify_all()


async def _answers(actor: Any) -> bool:
    from ray.exceptions import ActorDiedError, RayActorError

    try:
        await actor.__ray_ready__.remote()
    except ActorDiedError:
        return False
    except RayActorError:  # Out of reach for a moment.
        return True
    return True


def check_pairing(replicas: dict[str, Place], ranks: dict[int, Place]) -> None:
    """Check that each GPU has one replica and one learner.

    Raises:
        ConfigError: One has two of a kind, or one alone.
    """
    of_replicas, of_ranks = sorted(replicas.values()), sorted(ranks.values())
    if of_replicas == of_ranks and len(set(of_ranks)) == len(of_ranks):
        return

    def told(places: list[Place]) -> str:
        return ", ".join(f"GPU {gpu} of node {node[:8]}" for node, gpu in places) or "none"

    remedy = (
        f"replicas and learners were not placed in pairs: replicas are on {told(of_replicas)}, learners on "
        f"{told(of_ranks)}; start again when no other job takes parts of these GPUs, or set resources.colocate = false"
    )
    raise ConfigError("resources.colocate", True, remedy)
