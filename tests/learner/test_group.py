"""How a learner group ends, with recorded actors: nothing of Ray Train runs here."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray

from rlhf_ray.errors import LearnerError
from rlhf_ray.learner import group as module
from rlhf_ray.learner.group import LearnerGroup
from rlhf_ray.learner.packing import plan_update
from rlhf_ray.learner.update_result import UpdateResult


class Actor:
    """Answers each call by a function, or with what it raises."""

    def __init__(self, **methods: Any) -> None:
        for name, answer in methods.items():
            setattr(self, name, SimpleNamespace(remote=lambda *arguments, answer=answer: (answer, arguments)))


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
    monkeypatch.setattr(module, "remove_placement_group", gone.append)
    monkeypatch.setattr(module, "_POLL_S", 0.01)
    monkeypatch.setattr(module, "_STOP_TIMEOUT_S", 2.0)
    return gone


def group_of(
    bridge: Actor, monkeypatch: pytest.MonkeyPatch, *, on_gpu: bool = False, colocated: bool = False
) -> LearnerGroup:
    monkeypatch.setattr(module, "bridge_actor", lambda world_size, num_engines: bridge)
    spec: Any = SimpleNamespace(on_gpu=on_gpu, colocated=colocated)
    return LearnerGroup(
        spec=spec,
        run_id="run",
        num_learners=2,
        num_cpus=0.1,
        storage_path="",
        startup_timeout_s=1.0,
        update_timeout_s=1.0,
        max_restarts=0,
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

    monkeypatch.setattr(module, "placement_group_table", lambda group: {"state": next(states)})
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
    monkeypatch.setattr(module, "placement_group_table", lambda group: {"state": state})
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
    monkeypatch.setattr(module, "_STOP_TIMEOUT_S", 0.1)
    controller = Actor(abort=fail)
    bridge = Actor(controller=lambda: controller, placement_group=lambda: "placement group")
    group = group_of(bridge, monkeypatch)
    group._thread = threading.Thread(target=forever.wait, daemon=True)
    group._thread.start()
    group.stop()
    forever.set()
    assert ended == [controller, "placement group", bridge]


def test_neighbors_get_the_same_share_where_they_read_slices_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "put", lambda value: value)
    group = group_of(Actor(), monkeypatch)
    group._spec = SimpleNamespace(sequence_parallel=2)
    given: list[Any] = []

    def execute(verb: str, arguments: list[Any]) -> list[UpdateResult]:
        given.extend(arguments)
        return [
            UpdateResult(
                figures={"rank": rank},
                advantages=tuple(np.asarray([float(i)]) for i in share) if asked else None,
            )
            for rank, (share, _, _, asked, _) in enumerate(arguments)
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

    result = group.update(batch, plan, version=1, update_policy=True, with_advantages=True)

    shares = [share for share, *_ in given]
    assert shares == [plan.sequences[0], plan.sequences[0], plan.sequences[1], plan.sequences[1]]
    assert [part for _, part, *_ in given] == [plan.ranks[0], plan.ranks[0], plan.ranks[1], plan.ranks[1]]
    # Both have them: one of the two is asked.
    assert [asked for *_, asked, _ in given] == [True, False, True, False]
    assert result.advantages is not None
    assert [float(one[0]) for one in result.advantages] == [0.0, 1.0, 2.0, 3.0]


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
        wait_away=lambda: calls.append("away"),
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
