"""What a replica does about versions; its engine is recorded here, the real one is in tests/integration."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, OwnerDiedError

from rlhf_ray.learner.remote.bridge import Bridge as LearnersBridge
from rlhf_ray.rollouts import replica as replica_module
from rlhf_ray.rollouts.engine import EngineSpec
from rlhf_ray.rollouts.replica import RolloutReplica
from rlhf_ray.weight_sync.manifest import ReplicaFailure, WeightManifest


class Engine:
    """Takes a moment to load, and remembers what."""

    def __init__(self) -> None:
        self.version = 4
        self.pause_s = 0.0
        self.loaded: list[int] = []
        self.is_dead = False

    async def load_weights(self, manifest: WeightManifest, buckets: Sequence[Any]) -> None:
        await asyncio.sleep(0.02)
        self.version = manifest.version
        self.loaded.append(manifest.version)

    def shutdown(self) -> None:
        """A replica that is forgotten ends its engine."""


class Call:
    def __init__(self, answer: Any) -> None:
        self._answer = answer

    async def remote(self, *arguments: Any) -> Any:
        return self._answer(*arguments)


class Bridge:
    """Publishes whatever version it is asked for."""

    newest_weights = Call(lambda version, lost: (manifest(version), [ready()]))


def manifest(version: int) -> WeightManifest:
    return WeightManifest(version=version, publication=f"publication {version}", buckets=())


def ready() -> asyncio.Future[Any]:
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    future.set_result(None)
    return future


def late() -> asyncio.Future[Any]:
    return asyncio.get_running_loop().create_future()


@pytest.fixture
def replica() -> RolloutReplica:
    made = RolloutReplica.__new__(RolloutReplica)
    made._bridge = Bridge()
    made._timeline = False
    made._failure = None
    made._publication = None
    made._in_transfer = False
    made._is_starting = False
    made._awake = asyncio.Event()
    made._awake.set()
    made.replica_id = "r"
    made._engine = Engine()
    return made


def test_a_replica_that_is_behind_pulls_what_a_request_needs(replica: RolloutReplica) -> None:
    async def run() -> None:
        replica._updating = asyncio.Lock()
        await replica._catch_up(3)
        await replica._catch_up(5)

    asyncio.run(run())
    assert replica._engine.loaded == [5]


def test_catching_up_never_loads_over_something_newer(replica: RolloutReplica) -> None:
    """Version 6 is published while the weights of 5 are still on their way."""

    async def run() -> None:
        replica._updating = asyncio.Lock()
        weights = late()
        replica._bridge.newest_weights = Call(lambda version, lost: (manifest(version), [weights]))
        catching_up = asyncio.ensure_future(replica._catch_up(5))
        await asyncio.sleep(0)
        await replica.load_weights(manifest(6), [ready()])
        weights.set_result(None)
        await catching_up

    asyncio.run(run())
    assert replica._engine.loaded == [6]


def test_weights_that_died_with_a_learner_are_asked_for_again(replica: RolloutReplica) -> None:
    asked: list[tuple[int, str | None]] = []

    def newest_weights(version: int, lost: str | None) -> tuple[WeightManifest, list[Any]]:
        asked.append((version, lost))
        weights = ready() if lost else late()
        if not lost:
            weights.set_exception(OwnerDiedError("0" * 56, owner_address=None, call_site=""))
        return manifest(6), [weights]

    async def run() -> None:
        replica._updating = asyncio.Lock()
        replica._bridge.newest_weights = Call(newest_weights)
        await replica._catch_up(5)

    asyncio.run(run())
    assert asked == [(5, None), (5, "publication 6")]
    assert replica._engine.loaded == [6]


def test_a_restore_does_load_an_older_version(replica: RolloutReplica) -> None:
    async def run() -> None:
        replica._updating = asyncio.Lock()
        await replica.load_weights(manifest(2), [ready()])

    asyncio.run(run())
    assert replica._engine.version == 2


def test_a_replica_loads_in_its_turn(replica: RolloutReplica) -> None:
    async def run() -> list[int]:
        replica._updating = asyncio.Lock()
        turns = (frozenset({"q"}), frozenset({"q", "r"}), None)
        return [(await replica.load_weights(manifest(2), [ready()], turn)).version for turn in turns]

    before = replica._engine.version
    assert asyncio.run(run()) == [before, 2, 2]
    assert replica._engine.loaded == [2]


def test_a_request_that_is_cancelled_while_it_catches_up_leaves_a_sound_engine(replica: RolloutReplica) -> None:
    async def run() -> None:
        replica._updating = asyncio.Lock()
        request = asyncio.ensure_future(replica._catch_up(5))
        await asyncio.sleep(0.01)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        await asyncio.sleep(0.05)

    asyncio.run(run())
    assert replica._engine.loaded == [5]
    assert replica._failure is None


@pytest.mark.parametrize("came_in_time", [True, False])
def test_only_replicas_of_the_group_take_part_in_a_round_over_nccl(replica: RolloutReplica, came_in_time: bool) -> None:
    calls: list[str] = []

    def noted(name: str) -> Any:
        async def call(*_: Any) -> None:
            calls.append(name)

        return call

    names = ("init_weight_transfer", "begin_update", "apply_update", "finish_update")
    for name in names:
        setattr(replica._engine, name, noted(name))

    async def run() -> None:
        replica._updating = asyncio.Lock()
        await replica.init_weight_transfer({"r" if came_in_time else "another": {"rank_offset": 1}})
        await replica.begin_update()
        await replica.apply_update({})
        await replica.finish_update(5)
        assert not replica._updating.locked()

    asyncio.run(run())
    assert calls == (list(names) if came_in_time else [])


@pytest.mark.parametrize("finished", [False, True])
def test_a_replica_with_half_of_the_weights_ends_when_their_learners_died(
    finished: bool, replica: RolloutReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[int] = []
    monkeypatch.setattr(os, "_exit", ends.append)
    engine = replica._engine

    async def do(*_: Any) -> None:
        """The engine's part."""

    engine.begin_update = engine.apply_update = engine.finish_update = do  # type: ignore[method-assign]

    async def run() -> None:
        replica._updating, replica._in_group = asyncio.Lock(), True
        await replica.begin_update()
        await replica.apply_update({})
        if finished:
            await replica.finish_update(5)
        await replica.abandon_update()

    asyncio.run(run())
    assert ends == ([] if finished else [1])


def test_a_replica_that_would_begin_an_update_when_it_wakes_ends_when_its_learners_died(
    replica: RolloutReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[int] = []
    monkeypatch.setattr(os, "_exit", ends.append)

    async def run() -> None:
        replica._updating, replica._in_group = asyncio.Lock(), True
        await replica._updating.acquire()  # It is asleep.
        begins = asyncio.ensure_future(replica.begin_update())
        await asyncio.sleep(0)
        await replica.abandon_update()
        begins.cancel()

    asyncio.run(run())
    assert ends == [1]


@pytest.mark.parametrize("is_gone", [True, False])
def test_a_replica_that_starts_after_its_run_deletes_the_application_instead(
    is_gone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    deleted: list[str] = []
    context = SimpleNamespace(app_name="run-1-rollout", replica_id=SimpleNamespace(unique_id="r"))
    monkeypatch.setattr(replica_module.serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(replica_module.serve, "delete", lambda name, *, _blocking: deleted.append(name))

    def newest_version() -> int:
        if is_gone:
            raise ActorDiedError
        return 0

    def start(spec: EngineSpec) -> None:
        raise ValueError("an engine was started")

    monkeypatch.setattr(replica_module, "RolloutEngine", start)
    spec: Any = SimpleNamespace(timeline=False, colocated=False)
    bridge = SimpleNamespace(newest_version=Call(newest_version))

    with pytest.raises(ActorDiedError if is_gone else RuntimeError):
        asyncio.run(RolloutReplica.__init__(RolloutReplica.__new__(RolloutReplica), spec, bridge))
    assert deleted == (["run-1-rollout"] if is_gone else [])


def test_the_bridge_knows_of_an_engine_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    context = SimpleNamespace(app_name="run-1-rollout", replica_id=SimpleNamespace(unique_id="r"))
    node = SimpleNamespace(current_actor="me", get_node_id=lambda: "n", get_accelerator_ids=lambda: {"GPU": ["3"]})
    monkeypatch.setattr(replica_module.serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(replica_module.ray, "get_runtime_context", lambda: node)

    def build(spec: EngineSpec) -> None:
        told.append("build")
        raise ValueError("no memory")

    async def attend(*arguments: Any) -> None:
        await asyncio.Event().wait()

    class Open:
        def remote(self, *arguments: Any) -> Any:
            told.append(arguments)
            return asyncio.ensure_future(attend())

    class Turn:
        async def remote(self, *arguments: Any, **about: Any) -> bool:
            told.append("turn")
            return True

    monkeypatch.setattr(replica_module, "RolloutEngine", build)
    spec: Any = SimpleNamespace(timeline=False, colocated=True)
    bridge = SimpleNamespace(newest_version=Call(lambda: 0), attend_turns=Open(), follow_turn=Turn())
    with pytest.raises(RuntimeError, match="no memory"):
        asyncio.run(RolloutReplica.__init__(RolloutReplica.__new__(RolloutReplica), spec, bridge))
    assert told == [("r", "me", ("n", "3")), "turn", "build"]


@pytest.mark.parametrize("dies", [True, False])
@pytest.mark.parametrize(
    "step", ["load_weights", "init_weight_transfer", "begin_update", "apply_update", "finish_update"]
)
def test_an_error_in_an_update_is_told_before_the_replica_raises_it_or_ends(
    replica: RolloutReplica, step: str, dies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[int] = []
    told: list[ReplicaFailure] = []
    monkeypatch.setattr(os, "_exit", ends.append)
    replica._bridge.replica_failed = Call(told.append)
    arguments: dict[str, Any] = {
        "load_weights": lambda: (manifest(5), [ready()]),
        "init_weight_transfer": lambda: ({"r": {}},),
        "begin_update": lambda: (),
        "apply_update": lambda: ({},),
        "finish_update": lambda: (5,),
    }

    async def fail(*_: Any) -> None:
        replica._engine.is_dead = dies
        raise RuntimeError("size mismatch for w")

    monkeypatch.setattr(replica._engine, step, fail, raising=False)

    async def run() -> None:
        replica._updating, replica._in_group = asyncio.Lock(), True
        with pytest.raises(RuntimeError, match="size mismatch for w"):
            await getattr(replica, step)(*arguments[step]())
        with pytest.raises(RuntimeError, match="replica r failed"):
            await replica.check_health()

    asyncio.run(run())
    assert told == [ReplicaFailure(told_by="replica r", message="RuntimeError: size mismatch for w", is_new=False)]
    assert ends == ([1] if dies else [])


def test_a_replica_that_cannot_tell_raises_what_it_would_have_told(
    replica: RolloutReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: Any) -> None:
        raise RuntimeError("no engine")

    def gone(failure: ReplicaFailure) -> None:
        raise ActorDiedError

    monkeypatch.setattr(replica._engine, "load_weights", fail)
    replica._bridge.replica_failed = Call(gone)

    async def run() -> None:
        replica._updating = asyncio.Lock()
        with pytest.raises(RuntimeError, match="no engine"):
            await replica.load_weights(manifest(5), [ready()])

    asyncio.run(run())


class SharingEngine(Engine):
    """Writes down how it sleeps, wakes and loads."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Any] = []
        self.fails_at: str | None = None

    def _note(self, step: str) -> None:
        self.steps.append(step)
        if step == self.fails_at:
            raise RuntimeError("Memory usage increased after sleeping.")

    async def sleep(self) -> None:
        self._note("sleep")

    async def wake_weights(self) -> None:
        self._note("wake weights")

    async def wake(self) -> None:
        self._note("wake")

    async def load_weights(self, manifest: WeightManifest, buckets: Sequence[Any]) -> None:
        await super().load_weights(manifest, buckets)
        self._note(f"load {manifest.version}")


class OnBridge:
    """A bridge's methods as those of an actor's handle."""

    def __init__(self, bridge: LearnersBridge) -> None:
        self._bridge = bridge

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._bridge, name)
        return SimpleNamespace(remote=method)


@pytest.fixture
def sharing(replica: RolloutReplica, monkeypatch: pytest.MonkeyPatch) -> RolloutReplica:
    """A replica that takes turns with a rank, once its bridge is there."""
    here = SimpleNamespace(
        current_actor=SimpleNamespace(), get_node_id=lambda: "node", get_accelerator_ids=lambda: {"GPU": ["0"]}
    )
    monkeypatch.setattr(replica_module.ray, "get_runtime_context", lambda: here)
    replica._engine = SharingEngine()
    replica._engine.version = 1
    return replica


async def take_turn(bridge: LearnersBridge, token: str, version: int) -> None:
    """What the learners do in their turn: the rank comes, publishes and leaves."""
    held = asyncio.ensure_future(bridge.hold_turn(token))
    while not await bridge.wait_turn(0, "group", ("node", "0"), 5.0):
        pass
    await bridge.set_weights(manifest(version), [ready()])
    await bridge.give_turn_back(token)
    await held
    assert (await bridge.next_command(0, "group", version, 5.0, True)).command().name == "offload"
    assert await bridge.next_command(0, "group", version, 0.01, False) is None


def test_an_engine_sleeps_in_the_learners_turn_and_wakes_with_their_weights(sharing: RolloutReplica) -> None:
    async def run() -> None:
        bridge = LearnersBridge(1, 1)
        sharing._bridge, sharing._updating = OnBridge(bridge), asyncio.Lock()
        following = asyncio.ensure_future(sharing._follow_turns())
        await asyncio.sleep(0.01)
        turn = asyncio.ensure_future(take_turn(bridge, "turn", 2))
        while not sharing._engine.steps:
            await asyncio.sleep(0.001)
        # What comes while it sleeps waits until it is awake.
        publication = asyncio.ensure_future(sharing.load_weights(manifest(2), [ready()]))
        request = asyncio.ensure_future(sharing._awake.wait())
        await turn
        assert (await publication).version == 2
        await request
        following.cancel()

    asyncio.run(run())
    # Once, and before the cache takes its memory.
    assert sharing._engine.steps == ["sleep", "wake weights", "load 2", "wake"]


@pytest.mark.parametrize("step", ["sleep", "wake weights", "load 2", "wake"])
def test_an_engine_that_cannot_take_turns_frees_its_gpu_by_its_end(
    sharing: RolloutReplica, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[int] = []
    monkeypatch.setattr(os, "_exit", ends.append)
    sharing._engine.fails_at = step

    async def run() -> list[ReplicaFailure]:
        bridge = LearnersBridge(1, 1)
        assert bridge._turns is not None
        bridge._turns._is_alive = lambda actor: _known(not ends)
        sharing._bridge, sharing._updating = OnBridge(bridge), asyncio.Lock()
        following = asyncio.ensure_future(sharing._follow_turns())
        await asyncio.sleep(0.01)
        await asyncio.wait_for(take_turn(bridge, "turn", 2), 10.0)
        await asyncio.wait_for(following, 10.0)
        return await bridge.take_replica_failures()

    told = asyncio.run(run())
    assert ends == [1]
    assert [failure.message for failure in told] == ["RuntimeError: Memory usage increased after sleeping."]


async def _known(is_alive: bool) -> bool:
    return is_alive
