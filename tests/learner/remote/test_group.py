"""How a learner group ends, with recorded actors: nothing of Ray Train runs here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray

from rlhf_ray.checkpoints.folder import Folder
from rlhf_ray.errors import LearnerError
from rlhf_ray.learner.packing import plan_update
from rlhf_ray.learner.remote import group as module
from rlhf_ray.learner.remote import train_run
from rlhf_ray.learner.remote.commands import (
    GroupLost,
    LoadCommand,
    RecallCommand,
    Refusal,
    RenewCommand,
    Request,
    UpdateCommand,
    UpdateResult,
)
from rlhf_ray.learner.remote.group import LearnerGroup, StateLostError
from rlhf_ray.types import TokenEstimates


class Actor:
    """Answers each call by a function, or with what it raises."""

    def __init__(self, **methods: Any) -> None:
        for name, answer in ({"end_calls": lambda: None} | methods).items():
            setattr(self, name, SimpleNamespace(remote=lambda *arguments, answer=answer, **_: (answer, arguments)))


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Actors that were killed and placement groups that were removed."""

    def get(call: tuple[Any, tuple[Any, ...]], timeout: float | None = None) -> Any:
        answer, arguments = call
        return answer(*arguments)

    gone: list[Any] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "kill", gone.append)
    monkeypatch.setattr(train_run, "remove_placement_group", gone.append)
    for each in (module, train_run):
        monkeypatch.setattr(each, "_POLL_S", 0.01)
        monkeypatch.setattr(each, "STOP_TIMEOUT_S", 2.0)
    return gone


def group_of(
    bridge: Actor,
    monkeypatch: pytest.MonkeyPatch,
    *,
    on_gpu: bool = False,
    colocated: bool = False,
    state_interval: int = 1,
) -> LearnerGroup:
    monkeypatch.setattr(train_run, "bridge_actor", lambda world_size, num_engines: bridge)
    spec: Any = SimpleNamespace(on_gpu=on_gpu, colocated=colocated, sequence_parallel=1)
    return LearnerGroup(
        spec=spec,
        run_id="run",
        num_learners=2,
        num_cpus=0.1,
        storage_path="",
        startup_timeout_s=1.0,
        update_timeout_s=1.0,
        max_restarts=0,
        state_interval=state_interval,
        tensor_parallel_size=1,
        num_replicas=1,
    )


def cluster_of(monkeypatch: pytest.MonkeyPatch, *gpus: int, free: float = 0.0) -> None:
    """Pretend a node for each number of GPUs, and one that is gone."""
    nodes = [
        {"Alive": alive, "Resources": {"CPU": 8.0, "GPU": float(count)}}
        for alive, count in [*((True, count) for count in gpus), (False, 8)]
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 3.0, "GPU": free})


@pytest.mark.parametrize(
    ("gpus", "on_gpu", "waits"),
    [((4,), True, False), ((0, 4), True, False), ((4, 4), True, True), ((0,), False, False), ((0, 0), False, True)],
)
def test_places_are_waited_for_where_several_nodes_have_some(
    gpus: tuple[int, ...], on_gpu: bool, waits: bool, ended: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster_of(monkeypatch, *gpus)
    states = iter(["PENDING", "REMOVED", "PENDING", "CREATED"])
    groups = iter(["starting", None, "first", "first", "second", "second"])

    def answer(group: str | None) -> str | None:
        return fail() if group == "starting" else group

    monkeypatch.setattr(train_run, "placement_group_table", lambda group: {"state": next(states)})
    group_of(Actor(placement_group=lambda: answer(next(groups))), monkeypatch, on_gpu=on_gpu).wait_placed(
        threading.Event()
    )
    assert list(states) == ([] if waits else ["PENDING", "REMOVED", "PENDING", "CREATED"])


def test_learners_without_a_place_end_the_start_with_an_error_of_their_own(
    ended: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster_of(monkeypatch, 4, 4, free=1.0)
    group = group_of(Actor(placement_group=lambda: None), monkeypatch, on_gpu=True)
    with pytest.raises(LearnerError, match=r"timeout_s = 1 s.*no room for 2 of 0.1 CPUs and 1 GPU each.*1 GPUs"):
        group.wait_placed(threading.Event())
    group._error = ValueError("the cause")
    group._ended.set()
    with pytest.raises(LearnerError, match="the cause"):
        group.wait_placed(threading.Event())


def test_a_wait_for_places_ends_with_the_replicas_that_wait(ended: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cluster_of(monkeypatch, 4, 4)
    stopped = threading.Event()
    stopped.set()
    group_of(Actor(placement_group=lambda: None), monkeypatch, on_gpu=True).wait_placed(stopped)


@pytest.mark.parametrize(
    ("state", "told"), [("CREATED", "still loading their models"), ("PENDING", "3 CPUs and 0 GPUs")]
)
def test_a_start_that_is_late_tells_whether_the_learners_have_their_places(
    state: str, told: str, ended: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster_of(monkeypatch, 4)
    monkeypatch.setattr(train_run, "placement_group_table", lambda group: {"state": state})
    group = group_of(Actor(placement_group=lambda: "group", wait_ready=None), monkeypatch)
    monkeypatch.setattr(group, "_await", lambda ref, purpose: None)
    group.bridge.wait_ready = SimpleNamespace(remote=lambda *_, **__: None)
    with pytest.raises(LearnerError, match=told):
        group.wait_ready()


def fail(*_: Any) -> Any:
    raise ray.exceptions.GetTimeoutError("no answer")


def test_a_group_that_never_began_ends_its_bridge(ended: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = Actor(placement_group=lambda: None)
    group_of(bridge, monkeypatch).stop()
    assert ended == [bridge]


def test_a_bridge_that_does_not_answer_is_ended_all_the_same(ended: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = Actor(placement_group=fail, controller=fail, execute=fail)
    group = group_of(bridge, monkeypatch)
    group._name, forever = "group", threading.Event()
    group._thread = threading.Thread(target=forever.wait, daemon=True)
    group._thread.start()
    group.stop()
    forever.set()
    assert ended == [bridge]


def test_a_group_that_has_just_begun_to_start_is_aborted_as_soon_as_it_can_be(
    ended: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later it would take CPUs and GPUs that nothing gives back before this process ends."""
    aborted = threading.Event()
    controllers = iter([None, None, Actor(abort=aborted.set)])
    bridge = Actor(controller=lambda: next(controllers), placement_group=lambda: "placement group")
    group = group_of(bridge, monkeypatch)
    group._thread = threading.Thread(target=aborted.wait, daemon=True)
    group._thread.start()
    group.stop()
    group.stop()
    assert aborted.is_set()
    assert ended == ["placement group", bridge]


def test_a_controller_that_waits_for_resources_is_ended(ended: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    forever = threading.Event()
    monkeypatch.setattr(train_run, "STOP_TIMEOUT_S", 0.1)
    controller = Actor(abort=fail)
    bridge = Actor(controller=lambda: controller, placement_group=lambda: "placement group")
    group = group_of(bridge, monkeypatch)
    group._thread = threading.Thread(target=forever.wait, daemon=True)
    group._thread.start()
    group.stop()
    forever.set()
    assert ended == [controller, "placement group", bridge]


def estimates_of(index: int) -> TokenEstimates:
    return TokenEstimates(advantages=np.asarray([index], dtype=np.float32))


def test_neighbors_get_the_same_share_where_they_read_slices_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "put", lambda value: value)
    group = group_of(Actor(), monkeypatch)
    group._spec = SimpleNamespace(sequence_parallel=2)
    given: list[UpdateCommand] = []

    def execute(*commands: UpdateCommand) -> list[UpdateResult]:
        given.extend(commands)
        return [
            UpdateResult(
                metrics={"rank": rank},
                estimates=tuple(estimates_of(i) for i in command.batch) if command.with_estimates else None,
                kept_version=rank,
            )
            for rank, command in enumerate(commands)
        ]

    monkeypatch.setattr(group, "_execute", execute)
    batch: Any = SimpleNamespace(select=tuple)
    plan = plan_update(
        [5, 3, 4, 6],
        [2, 2, 2, 2],
        num_minibatches=1,
        num_epochs=1,
        num_ranks=2,
        max_tokens=100,
        attention_length=1e9,
        packed=False,
        seed=0,
    )

    result = group.update(batch, plan, version=1, update_policy=True, with_estimates=True)

    assert [order.batch for order in given] == [
        plan.sequences[0],
        plan.sequences[0],
        plan.sequences[1],
        plan.sequences[1],
    ]
    assert [order.plan for order in given] == [plan.ranks[0], plan.ranks[0], plan.ranks[1], plan.ranks[1]]
    # Both have them: one of the two is asked.
    assert [order.with_estimates for order in given] == [True, False, True, False]
    assert result.estimates is not None
    assert [float(one.advantages[0]) for one in result.estimates] == [0.0, 1.0, 2.0, 3.0]
    assert result.kept_version == 0


@pytest.mark.parametrize("colocated", [True, False])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_a_turn_is_held_and_given_back_until_the_bridge_knows_it(
    colocated: bool, error: type[BaseException] | None, ended: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    # The bridge died as the turn was given back: it is asked anew to hold it, by Ray.
    is_over = iter([False, True])

    def wait(refs: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        if refs[0][0] is hold and not next(is_over):
            return [], refs
        return refs, []

    def hold(token: str) -> None:
        calls.append("hold")

    monkeypatch.setattr(ray, "wait", wait)
    bridge = Actor(
        hold_turn=hold,
        give_turn_back=lambda token: calls.append("give back"),
        wait_away=lambda timeout_s: calls.append("away"),
    )
    group = group_of(bridge, monkeypatch, colocated=colocated)

    def work() -> None:
        with group.turn():
            calls.append("work")
            if error is not None:
                raise error

    if error is None:
        work()
    else:
        with pytest.raises(error):
            work()
    # After Ctrl-C the caller does not wait for learners that may be in the middle of something.
    after = ["give back", "give back", *(["away"] if error is None else [])]
    assert calls == (["work", *after] if colocated else ["work"])


def test_learners_that_died_while_they_sent_come_back_in_their_turn(
    ended: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    depth = [0]

    def note(call: str, answer: Any) -> Any:
        calls.append(call if depth[0] else f"{call} (engines' turn)")
        return answer

    @contextmanager
    def turn(self: LearnerGroup) -> Iterator[None]:
        depth[0] += 1
        yield
        depth[0] -= 1

    monkeypatch.setattr(LearnerGroup, "turn", turn)
    monkeypatch.setattr(ray, "wait", lambda refs, timeout: (refs, []))
    bridge = Actor(
        wait_ready=lambda *_: note("start", "group"),
        controller=lambda: None,
        places=lambda: ({}, {}),
        execute=lambda request, _: note(
            request.command().name, GroupLost() if request.command().name == "send" else [0]
        ),
    )
    group = group_of(bridge, monkeypatch, colocated=True)
    group.wait_ready()
    group.stage()
    assert group.send(("a",)) is None
    assert calls == ["start", "layout", "stage", "send (engines' turn)", "start", "layout", "recall"]


def test_nothing_is_staged_where_learners_have_gpus_of_their_own(
    ended: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    group_of(Actor(), monkeypatch, colocated=False).stage()


def test_learners_that_do_not_leave_their_gpus_are_an_error(ended: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "wait", lambda refs, timeout: (refs, []))
    bridge = Actor(
        hold_turn=lambda token: None, give_turn_back=lambda token: None, wait_away=lambda timeout_s: timeout_s == 1.0
    )
    group = group_of(bridge, monkeypatch, colocated=True)
    with pytest.raises(LearnerError, match="update_timeout_s = 1 s to leave their GPUs"), group.turn():
        pass


class Batch:
    """Of one rank."""

    def __init__(self, name: str) -> None:
        self.name = name

    def select(self, _: Any) -> str:
        return self.name


class Ranks:
    """A bridge and one rank behind it, whose weights are the names of the batches that it was trained on.

    Attributes:
        dies: Tells of a command whether the rank dies of it.
        commands: Name and version of what was carried out.
    """

    def __init__(self) -> None:
        self.weights: list[str] = []
        self.version = 0
        self.kept: dict[int, list[str]] = {}
        self.copying: int | None = None
        self.copies_fail = False
        self.spared: list[int | None] = []
        self.starts = 0
        self.dies: Callable[[str, int], bool] = lambda name, version: False
        self.refuses: Callable[[int], bool] = lambda version: False
        self.commands: list[tuple[str, int | None]] = []
        self.renewals: list[tuple[Any, bool]] = []

    def start(self, *_: Any, **__: Any) -> str:
        self.starts += 1
        self.weights, self.version, self.copying = [], 0, None
        return f"group {self.starts}"

    def execute(self, request: Request, _: float) -> Any:
        assert request.group == f"group {self.starts}"
        command = request.command()
        version = getattr(command, "version", None)
        if command.name != "update" and self.copying is not None:
            self.kept[self.copying], self.copying = list(self.weights), None
        if self.dies(command.name, version):
            self.start()
            return GroupLost()
        if command.name == "layout":
            return [False]
        self.commands.append((command.name, version))
        self.renewals += [(command.spec, command.begins)] if isinstance(command, RenewCommand) else []
        return [getattr(self, command.name)(command)]

    def update(self, order: UpdateCommand) -> Any:
        assert order.version == self.version + 1
        if self.copying is not None:
            self.kept[self.copying], self.copying = list(self.weights), None
        self.weights = [*self.weights, order.batch]
        if self.refuses(order.version):
            return Refusal("not finite", partly_updated=True)
        self.version = order.version
        kept_version = max(self.kept, default=None)
        if order.keeps_state and not self.copies_fail:
            self.copying = order.version
        self.spared.append(order.spared_version)
        return UpdateResult(metrics={}, kept_version=kept_version)

    def recall(self, command: RecallCommand) -> int | None:
        newest = max((one for one in self.kept if one <= command.version), default=None)
        if newest is not None:
            self.weights, self.version = list(self.kept[newest]), newest
        return newest

    def renew(self, command: RenewCommand) -> None:
        self.weights, self.version, self.copying = [], 0, None
        if command.begins:
            self.kept = {}

    def load(self, command: LoadCommand) -> None:
        self.weights, self.version, self.kept = ["loaded"], command.version, {}

    def save(self, _: Any) -> None:
        self.kept[self.version] = list(self.weights)


@pytest.fixture
def ranks(ended: list[Any], monkeypatch: pytest.MonkeyPatch) -> Ranks:
    monkeypatch.setattr(ray, "wait", lambda refs, timeout: (refs, []))
    monkeypatch.setattr(ray, "put", lambda one: one)
    return Ranks()


@pytest.fixture
def group(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> LearnerGroup:
    """Keeps the state of every third version."""
    bridge = Actor(
        wait_ready=ranks.start,
        controller=lambda: None,
        execute=ranks.execute,
        take_replica_failures=list,
        wait_saved=lambda *_: {},
    )
    started = group_of(bridge, monkeypatch, state_interval=3)
    started.wait_ready()
    return started


def update(group: LearnerGroup, *versions: int) -> None:
    plan: Any = SimpleNamespace(sequences=((),), ranks=("plan",))
    for version in versions:
        batch: Any = Batch(f"batch {version}")
        group.update(batch, plan, version=version, update_policy=True, with_estimates=True)


def after(*versions: int) -> list[str]:
    return [f"batch {version}" for version in versions]


def once(name: str, version: int) -> Callable[[str, int], bool]:
    left = [True]
    return lambda *command: command == (name, version) and bool(left and left.pop())


@pytest.mark.parametrize("dies_at", range(1, 9))
def test_updates_since_the_newest_kept_state_are_made_again(group: LearnerGroup, ranks: Ranks, dies_at: int) -> None:
    ranks.dies = once("update", dies_at)
    update(group, *range(1, 9))
    assert ranks.weights == after(*range(1, 9))
    assert group.restarts == 1
    # The copy of version 3 is complete when that to 4 has been made, not before.
    base = {1: 0, 2: 0, 3: 0, 4: 0, 5: 3, 6: 3, 7: 3, 8: 6}[dies_at]
    restarted = ranks.commands.index(("recall", dies_at - 1))
    assert ranks.commands[restarted + 1 :][: dies_at - base] == [
        ("update", one) for one in range(base + 1, dies_at + 1)
    ]


def test_another_trials_learners_that_die_go_on_with_its_settings_from_what_was_kept(
    group: LearnerGroup, ranks: Ranks
) -> None:
    update(group, 1, 2, 3, 4)
    spec: Any = SimpleNamespace(colocated=False, sequence_parallel=1)
    group.renew(spec)
    assert (ranks.weights, ranks.kept) == ([], {})
    update(group, 1, 2, 3, 4)
    ranks.dies = once("update", 5)
    update(group, 5)
    assert ranks.weights == after(1, 2, 3, 4, 5)
    assert ranks.renewals == [(spec, True), (spec, False)]


def test_a_death_while_updates_are_made_again_begins_with_the_kept_state_again(
    group: LearnerGroup, ranks: Ranks
) -> None:
    update(group, 1, 2, 3, 4, 5)
    deaths = [once("update", 6), once("update", 5), once("recall", 5)]
    ranks.dies = lambda *command: any(death(*command) for death in deaths)
    update(group, 6)
    assert ranks.weights == after(1, 2, 3, 4, 5, 6)
    assert group.restarts == 3


def test_batches_are_let_go_of_when_a_state_is_kept(group: LearnerGroup, ranks: Ranks) -> None:
    held = []
    for version in range(1, 11):
        update(group, version)
        held.append([orders[0].version for orders in group._since_kept])
    assert held == [[1], [1, 2], [1, 2, 3], [4], [4, 5], [4, 5, 6], [7], [7, 8], [7, 8, 9], [10]]


def test_batches_that_no_state_follows_are_bounded(group: LearnerGroup, ranks: Ranks) -> None:
    ranks.copies_fail = True
    update(group, *range(1, 61))
    assert len(group._since_kept) == 24
    ranks.dies = once("update", 61)
    with pytest.raises(StateLostError, match="state at policy version 60 is gone"):
        update(group, 61)


def test_a_state_that_was_loaded_and_is_not_kept_is_lost(group: LearnerGroup, ranks: Ranks) -> None:
    update(group, 1, 2, 3, 4)
    group.load(Folder.at("/checkpoint"), 0)
    ranks.dies = once("update", 1)
    with pytest.raises(StateLostError, match="state at policy version 0 is gone"):
        update(group, 1)
    with pytest.raises(StateLostError, match="restore a checkpoint"):
        update(group, 1)
    group.load(Folder.at("/checkpoint"), 7)
    update(group, 8)
    assert ranks.weights == ["loaded", "batch 8"]


def test_an_update_that_is_refused_half_way_is_undone(group: LearnerGroup, ranks: Ranks) -> None:
    update(group, 1, 2, 3, 4, 5)
    ranks.refuses = lambda version: version == 6
    with pytest.raises(LearnerError, match="refuse to update: not finite"):
        update(group, 6)
    assert ranks.weights == after(1, 2, 3, 4, 5)
    ranks.refuses = lambda version: False
    update(group, 6)
    assert ranks.weights == after(1, 2, 3, 4, 5, 6)


def test_the_version_before_any_update_is_spared_too(group: LearnerGroup, ranks: Ranks) -> None:
    group.save(Folder.at("/checkpoint"))
    update(group, 1, 2, 3, 4)
    assert ranks.spared == [0] * 4
    assert [orders[0].version for orders in group._since_kept] == [1, 2, 3, 4]


def test_places_that_a_new_bridge_has_not_heard_of_yet_are_waited_for(
    ended: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have died between the start of replicas and that of learners."""
    replicas = {"a": ("node", "0"), "b": ("node", "1")}
    ranks = {0: ("node", "1"), 1: ("node", "0")}
    known: list[Any] = [({}, {}), ({"a": replicas["a"]}, ranks), (replicas, {0: ranks[0]}), (replicas, ranks)]
    monkeypatch.setattr(module, "_POLL_S", 0.0)
    group = group_of(Actor(places=lambda: known.pop(0)), monkeypatch, on_gpu=True, colocated=True)
    group._num_replicas = 2
    monkeypatch.setattr(group, "turn", nullcontext)
    monkeypatch.setattr(group, "_wait_until_ready", lambda: None)
    group.wait_ready()
    assert known == []


def test_a_version_that_is_being_saved_is_spared_and_what_follows_it_can_be_made_again(
    group: LearnerGroup, ranks: Ranks
) -> None:
    update(group, 1, 2, 3, 4)
    written = group.save(Folder.at("/checkpoint"))
    update(group, 5, 6, 7)
    assert ranks.spared == [None] * 4 + [4, 4, 4]
    # The copy of version 6 may be overwritten from now on, that of 4 is not.
    assert [orders[0].version for orders in group._since_kept] == [5, 6, 7]
    assert written() == {}
    update(group, 8)
    assert ranks.spared[-1] is None
    assert [orders[0].version for orders in group._since_kept] == [7, 8]
