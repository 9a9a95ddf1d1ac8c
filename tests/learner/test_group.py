"""How a learner group ends, with recorded actors: nothing of Ray Train runs here."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from rlhf_ray.learner import group as module
from rlhf_ray.learner.group import LearnerGroup


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


def group_of(bridge: Actor, monkeypatch: pytest.MonkeyPatch, *, colocated: bool = False) -> LearnerGroup:
    monkeypatch.setattr(module, "bridge_actor", lambda world_size, num_engines: bridge)
    spec: Any = SimpleNamespace(on_gpu=False, colocated=colocated)
    return LearnerGroup(
        spec=spec,
        run_id="run",
        num_learners=1,
        num_cpus=0.1,
        storage_path="",
        startup_timeout_s=1.0,
        update_timeout_s=1.0,
        max_restarts=0,
        tensor_parallel_size=1,
        num_replicas=1,
    )


def fail(*_: Any) -> None:
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
