"""What a rank does about commands; its learner is recorded here, the real one is in tests/integration."""

from __future__ import annotations

import asyncio
import sys
import threading
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from ray.exceptions import ActorDiedError
from some_commands import command, request, send, update

from rlhf_ray.errors import LearnerError
from rlhf_ray.learner.kept_state import KeptState
from rlhf_ray.learner.remote import train_loop as module
from rlhf_ray.learner.remote.commands import Command, OffloadCommand, RankFailure, Refusal, RenewCommand, Request
from rlhf_ray.learner.remote.state_keeper import StateKeeper
from rlhf_ray.types import TraceSpan

GROUP = "first"


class Call:
    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def remote(self, *arguments: Any) -> Any:
        return self._answer(*arguments)


class Bridge:
    """Gives commands and takes their answers."""

    def __init__(self, *requests: Request) -> None:
        self._requests: Iterator[Request] = iter((*requests, order("stop")))
        self.answers: list[tuple[str, Any]] = []
        self.failures: list[RankFailure] = []
        self.next_command = Call(lambda *_: next(self._requests))
        self.answer = Call(lambda request_id, rank, result: self.answers.append((request_id, result)))
        self.fail = Call(self.failures.append)
        self.spans: list[TraceSpan] = []
        self.add_spans = Call(self.spans.extend)


class Worker(module._Worker):
    """Counts what it carries out."""

    is_resident = True

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge
        self._rank = 1
        self._kept = KeptState()
        self._to_keep = self._updated = self._broken_off = None
        self.version = 0
        self.done: list[str] = []

    def execute(self, command: Command, request_id: str) -> str:
        self.done.append(command.name)
        return f"{command.name} {len(self.done)}"


def order(command: Command | str) -> Request:
    return request(command, group=GROUP)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.ray, "get", lambda answer: answer)
    monkeypatch.setattr(module, "_name_of_group", lambda: GROUP)


def serve(*requests: Request) -> tuple[Worker, Bridge]:
    bridge = Bridge(*requests)
    worker = Worker(bridge)
    module._serve(worker, bridge, 1, GROUP, timeline=False)
    return worker, bridge


def test_a_command_that_comes_again_is_answered_and_not_carried_out_again() -> None:
    repeated = order("update")
    worker, bridge = serve(repeated, repeated, order("update"))

    assert worker.done == ["update", "update"]
    assert [result for _, result in bridge.answers] == ["update 1", "update 1", "update 2", None]


def test_an_update_that_comes_again_after_a_publication_is_not_carried_out_again() -> None:
    """A replica that starts may have the weights published before the Algorithm's call comes once more."""
    repeated, publish = order("update"), order("publish")
    worker, bridge = serve(repeated, publish, repeated)

    assert worker.done == ["update", "publish"]
    assert bridge.answers[:3] == [
        (repeated.request_id, "update 1"),
        (publish.request_id, "publish 2"),
        (repeated.request_id, "update 1"),
    ]


def test_an_update_that_is_asked_for_anew_is_made_once_a_version() -> None:
    """After Ctrl-C in a notebook: another command, for the same batch."""

    class Learner:
        token_estimates = None
        updates = 0
        steps_taken = 0

        def update(self, batch: str, plan: str, **_: Any) -> dict[str, float]:
            self.updates += 1
            return {"loss": float(self.updates)}

    worker = Worker(Bridge())
    worker._learner = Learner()
    losses = [worker._update(update(version)).metrics["loss"] for version in (1, 1, 2, 2)]
    assert losses == [1.0, 1.0, 2.0, 2.0]

    worker.version = 1  # Restored.
    assert worker._update(update(2)).metrics["loss"] == 3.0


def test_a_refused_command_is_answered_and_the_next_one_is_carried_out() -> None:
    class Refusing(Worker):
        def execute(self, command: Command, request_id: str) -> str:
            if command.name == "update":
                raise LearnerError("advantages not finite")
            return super().execute(command, request_id)

    bridge = Bridge(repeated := order("update"), repeated, order("publish"))
    module._serve(Refusing(bridge), bridge, 1, GROUP, timeline=True)

    refusal = Refusal("advantages not finite")
    assert [result for _, result in bridge.answers] == [refusal, refusal, "publish 1", None]
    assert [span.name for span in bridge.spans] == ["publish"]


def test_an_update_that_is_refused_makes_no_version_and_no_state_to_keep() -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise LearnerError("advantages not finite")

    worker = Worker(Bridge())
    worker._learner = SimpleNamespace(update=refuse, steps_taken=7)

    with pytest.raises(LearnerError, match=r"^policy version 1: advantages not finite"):
        worker._update(update(1, keeps_state=True))
    assert (worker.version, worker._to_keep, worker.is_partly_updated) == (0, None, False)


class HalfAnUpdate:
    """Takes a step, and finds that the next one must not be made."""

    def __init__(self, *_: Any) -> None:
        self.steps_taken = 4
        self.recalled: list[int] = []
        self.recall = self.recalled.append
        self.load = self.keep_state = self.wait_copied = lambda *_, **__: None

    def update(self, *_: Any, **__: Any) -> None:
        self.steps_taken += 1
        raise LearnerError("gradient not finite")


@pytest.fixture
def broken_off(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> module._Worker:
    """A rank whose update ended after a step; the parameter are the versions that it keeps."""
    monkeypatch.setattr(module, "Learner", HalfAnUpdate)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", lambda found, mine: found.__setitem__(slice(2), (mine, [3, 6])))
    for method in ("_adopt_state", "_hold_state"):
        monkeypatch.setattr(module._Worker, method, lambda _: None)
    worker = module._Worker(SimpleNamespace(keeps_state=True, on_gpu=False, colocated=False), Bridge(), 0)
    worker.version = 7
    worker._kept = SimpleNamespace(versions=request.param, forget=lambda: None, paths=list)
    with pytest.raises(LearnerError, match="policy version 8: gradient not finite"):
        worker._update(update(8))
    return worker


@pytest.mark.parametrize("broken_off", [[3, 8]], indirect=True)
def test_steps_of_an_update_that_is_broken_off_are_undone(broken_off: module._Worker) -> None:
    assert broken_off.is_partly_updated
    assert broken_off._recall(7) == 3  # The other rank has 3 and 6: the newest that both have, and not version 8.
    assert broken_off._learner.recalled == [3]
    assert (broken_off.version, broken_off.is_partly_updated) == (3, False)


@pytest.mark.parametrize("broken_off", [[]], indirect=True)
@pytest.mark.parametrize("name", ["update", "publish", "stage", "send", "save", "export"])
def test_weights_of_half_an_update_are_read_by_nothing(broken_off: module._Worker, name: str) -> None:
    assert broken_off._recall(7) is None
    with pytest.raises(LearnerError, match=r"gradient not finite .*restore a checkpoint"):
        broken_off.execute(command(name), "id")
    broken_off._load(SimpleNamespace(local="checkpoint"), 2)
    assert (broken_off.version, broken_off.is_partly_updated) == (2, False)


def test_a_refusal_says_whether_weights_are_those_of_no_version() -> None:
    class Refusing(Worker):
        def execute(self, command: Command, request_id: str) -> str:
            self._broken_off = None if self.is_partly_updated else "half an update"
            raise LearnerError("gradient not finite")

    bridge = Bridge(order("update"), order("save"))
    module._serve(Refusing(bridge), bridge, 1, GROUP, timeline=False)
    assert [result.partly_updated for _, result in bridge.answers[:2]] == [True, False]


@pytest.mark.parametrize("names", [["update", "publish", "update"], ["update", "update"], ["update", "offload"]])
def test_a_state_is_copied_after_the_publication_and_before_anything_else(names: list[str]) -> None:
    events: list[str] = []

    class Learner:
        token_estimates = None
        is_offloaded = False
        steps_taken = 0

        def update(self, *_: Any, **__: Any) -> dict[str, float]:
            events.append("updated")
            return {}

        def keep_state(self, version: int, *, spare: int | None) -> None:
            events.append(f"copy of {version}")

        def offload(self) -> None:
            events.append("offload")

    class Publishing(Worker):
        execute = module._Worker.execute
        offload = module._Worker.offload

        def _publish(self) -> None:
            events.append("published")

    bridge = Bridge(
        *(
            order({"update": update(number, keeps_state=True), "offload": OffloadCommand()}.get(name, name))
            for number, name in enumerate(names, start=1)
        )
    )
    bridge.answer = Call(lambda *_: events.append("answered"))
    worker = Publishing(bridge)
    worker._learner, worker._keeps_state = Learner(), False
    module._serve(worker, bridge, 1, GROUP, timeline=False)

    first = ["updated", "answered"] + (["published", "answered"] if "publish" in names else [])
    assert events[: len(first) + 2] == [*first, "copy of 1", "offload" if names[-1] == "offload" else "updated"]


def test_a_state_that_was_loaded_is_kept_when_that_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("_adopt_state", "_hold_state"):
        monkeypatch.setattr(module._Worker, method, lambda _: None)
    monkeypatch.setattr(module, "Learner", Copying)
    worker = module._Worker(SimpleNamespace(keeps_state=True, on_gpu=False, colocated=False), Bridge(), 0)
    worker._kept.begin(9, {"weight": torch.zeros(2)})
    worker._load(SimpleNamespace(local="checkpoint"), 2)
    assert [file.version for file in worker._kept._files if file.version is not None] == [2]


class Copying:
    """Keeps a weight."""

    def __init__(self, _: Any, kept: KeptState) -> None:
        self._kept = kept
        self.load = lambda folder: None
        self.wait_copied = kept.wait

    def keep_state(self, version: int, *, spare: int | None) -> None:
        self._kept.begin(version, {"weight": torch.ones(10**6)})


class CyclicLearner:
    """Holds what refers back to it, as FSDP's hooks do, and knows which learners there are when one is built."""

    alive: ClassVar[weakref.WeakSet[CyclicLearner]] = weakref.WeakSet()
    found: ClassVar[list[int]] = []

    def __init__(self, *_: Any) -> None:
        self.found.append(len(self.alive))
        self.alive.add(self)
        self.closed = False
        self.itself = self

    def close(self) -> None:
        self.closed = True


class Sender:
    def __init__(self, learner: CyclicLearner, closed: list[bool]) -> None:
        self._learner, self._closed = learner, closed

    def close(self) -> None:
        self._closed.append(self._learner.closed)


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_renewed_learner_is_built_when_nothing_of_the_one_before_is_left(
    on_gpu: bool, begins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "Learner", CyclicLearner)
    # What is freed goes back to the GPU before anything new is built there.
    emptied: list[int] = []
    monkeypatch.setattr(module.torch.cuda, "empty_cache", lambda: emptied.append(len(CyclicLearner.alive)))
    CyclicLearner.found.clear()
    CyclicLearner.alive.clear()
    spec = SimpleNamespace(keeps_state=True, on_gpu=on_gpu, colocated=False)
    before = KeptState(2)
    before.begin(3, {"weight": torch.ones(2)})
    before.wait()
    keeper = StateKeeper()
    asyncio.run(keeper.hold_state(0, before.paths()))
    held = Call(lambda rank: asyncio.run(keeper.held_state(rank)))
    monkeypatch.setattr(module.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "node"))
    bridge: Any = Bridge()
    again: list[tuple[int, list[str]]] = []
    stay_held = Call(lambda rank, paths: again.append((rank, paths)))
    bridge.keeper = Call(lambda node: SimpleNamespace(held_state=held, stay_held=stay_held))
    worker = module._Worker(spec, bridge, 0)
    assert worker._kept.versions == [3]
    closed: list[bool] = []
    worker._sender = Sender(worker._learner, closed)
    worker.version = 3

    worker.execute(RenewCommand(spec=spec, begins=begins), "id")

    assert CyclicLearner.found == [0, 0]
    assert closed == [False]
    assert emptied == [0] * on_gpu
    # Ranks that were started again go back to it.
    assert worker._kept.versions == ([] if begins else [3])
    assert (worker._sender, worker.version) == (None, 0)


@pytest.mark.parametrize("transfer", ["nccl", "ipc"])
def test_weights_are_sent_the_way_that_is_set(transfer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, int, tuple[str, ...]]] = []

    def sender(way: str) -> Any:
        return lambda **_: SimpleNamespace(send=lambda version, replicas: sent.append((way, version, replicas)))

    for way, name in (("nccl", "NcclSender"), ("ipc", "IpcSender")):
        monkeypatch.setitem(sys.modules, f"rlhf_ray.weight_sync.{way}", SimpleNamespace(**{name: sender(way)}))
    source = SimpleNamespace(size_bytes=lambda: 12)
    monkeypatch.setattr(
        module, "Learner", lambda spec, kept: SimpleNamespace(is_offloaded=False, weight_source=lambda: source)
    )
    bridge = SimpleNamespace(set_version=Call(lambda version: None))
    spec = SimpleNamespace(keeps_state=False, on_gpu=True, weight_transfer=transfer, colocated=False)
    worker = module._Worker(spec, bridge, 0)
    worker.version = 4

    assert worker.execute(send("a", "b"), "id") == 12
    assert sent == [(transfer, 4, ("a", "b"))]


def test_the_state_of_a_rank_is_held_by_the_keeper_after_the_one_that_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On another node than the bridge's a keeper ends with the bridge."""
    monkeypatch.setattr(module, "_HOLD_AGAIN_S", 0.0)
    monkeypatch.setattr(module.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "node"))
    monkeypatch.setattr(module._Worker, "_adopt_state", lambda _: None)
    monkeypatch.setattr(module, "Learner", Copying)
    held, is_held = [], threading.Event()

    def hold(rank: int, paths: list[str]) -> None:
        held.append((rank, paths))
        if len(held) == 1:
            raise ActorDiedError
        is_held.set()

    bridge: Any = Bridge()
    bridge.keeper = Call(lambda node: SimpleNamespace(stay_held=Call(hold)))
    worker = module._Worker(SimpleNamespace(keeps_state=True, on_gpu=False, colocated=False), bridge, 0)
    for version in (1, 1, 1):
        worker._to_keep = version, None
        worker.begin_to_keep()
    assert is_held.wait(30)
    assert held[-1] == (0, worker._held)
    assert len({tuple(paths) for _, paths in held}) == len(held) - 1, "told once, and once more"


@pytest.mark.parametrize("ended_by_ray_train", [True, False])
def test_an_error_is_reported_unless_ray_train_ends_the_group(
    ended_by_ray_train: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends the process group before the workers: what they are at fails then."""

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("Default process group has not been initialized")

    monkeypatch.setattr(module, "_Worker", fail)
    monkeypatch.setattr(dist, "is_initialized", lambda: not ended_by_ray_train)
    context = type("Context", (), {"get_world_rank": lambda self: 1})
    monkeypatch.setattr("ray.train.get_context", context)
    bridge = Bridge()

    with pytest.raises(ValueError, match="Default process group"):
        module.train_loop({"spec": SimpleNamespace(colocated=False, timeline=False), "bridge": bridge})
    assert [failure.rank for failure in bridge.failures] == ([] if ended_by_ray_train else [1])


class SharedLearner:
    """Writes down where its models go."""

    packed = False

    def __init__(self) -> None:
        self.is_offloaded = False
        self.moves: list[str] = []

    def offload(self) -> None:
        self.is_offloaded = True
        self.moves.append("offload")

    def onload(self) -> None:
        self.is_offloaded = False
        self.moves.append("onload")

    def export(self, folder: None) -> None:
        assert not self.is_offloaded
        self.moves.append("export")

    def stage_weights(self) -> None:
        assert not self.is_offloaded
        self.moves.append("stage")

    def weight_source(self) -> Any:
        return SimpleNamespace(size_bytes=lambda: 12)


def test_a_rank_leaves_its_gpu_when_it_is_told_to_and_comes_back_for_a_command() -> None:
    class Polled(Bridge):
        def __init__(self, *commands: Command) -> None:
            super().__init__(*commands)
            self.resident: list[bool] = []
            self.places: list[Any] = []
            self.next_command = Call(self._next)

        def _next(self, *poll: Any) -> Command:
            self.resident.append(poll[-2])
            self.places.append(poll[-1])
            return next(self._requests)

    bridge = Polled(order("offload"), order("layout"), order("export"), order("offload"))
    worker = module._Worker.__new__(module._Worker)
    worker._learner, worker._bridge, worker._rank, worker.version = SharedLearner(), bridge, 1, 0
    worker._broken_off = worker._to_keep = None
    worker._kept = KeptState()
    module._serve(worker, bridge, 1, GROUP, place=("node", "3"), timeline=False)

    assert worker._learner.moves == ["offload", "onload", "export", "offload"]
    assert bridge.resident == [True, False, False, True, False]
    assert bridge.places == [("node", "3")] * 5
    # To leave has no answer: that it asks again says it.
    assert [result for _, result in bridge.answers] == [False, None, None]


def test_a_rank_sends_what_it_has_staged_and_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sender:
        def send(self, version: int, replicas: tuple[str, ...]) -> None:
            assert learner.is_offloaded
            learner.moves.append(f"send {version}")

        def close(self) -> None: ...

    learner = SharedLearner()
    monkeypatch.setitem(sys.modules, "rlhf_ray.weight_sync.nccl", SimpleNamespace(NcclSender=None))
    monkeypatch.setitem(sys.modules, "rlhf_ray.weight_sync.ipc", SimpleNamespace(IpcSender=lambda **_: Sender()))
    monkeypatch.setattr(module, "Learner", lambda spec, kept: learner)
    bridge = SimpleNamespace(set_version=Call(lambda version: None))
    spec = SimpleNamespace(keeps_state=False, on_gpu=True, weight_transfer="ipc", colocated=True)
    worker = module._Worker(spec, bridge, 0)
    with pytest.raises(LearnerError, match="version 0 was not staged"):
        worker.execute(send("a"), "id")
    for version in (1, 2):
        worker.version = version
        worker.execute(command("stage"), "id")
        worker.offload()
        assert worker.execute(send("a"), "id") == 12
    assert learner.moves == ["stage", "offload", "send 1", "onload", "stage", "offload", "send 2"]
    worker.version = 3  # Ranks that were started again have staged nothing of it.
    with pytest.raises(LearnerError, match="version 3 was not staged"):
        worker.execute(send("a"), "id")


def test_a_rank_builds_its_models_in_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    may_come = iter([False, False, True])

    def wait_turn(rank: int, group: str, place: tuple[str, str], timeout_s: float) -> bool:
        calls.append((rank, group, place))
        return next(may_come)

    def build(*_: Any) -> None:
        calls.append("built")
        raise ValueError("the test ends here")

    here = SimpleNamespace(get_node_id=lambda: "node", get_accelerator_ids=lambda: {"GPU": ["3"]})
    monkeypatch.setattr(module.ray, "get_runtime_context", lambda: here)
    monkeypatch.setattr("ray.train.get_context", lambda: SimpleNamespace(get_world_rank=lambda: 1))
    monkeypatch.setattr(module, "_Worker", build)
    bridge = Bridge()
    bridge.wait_turn = Call(wait_turn)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="ends here"):
        module.train_loop({"spec": SimpleNamespace(colocated=True, timeline=False), "bridge": bridge})
    assert calls == [(1, GROUP, ("node", "3"))] * 3 + ["built"]
