"""What is repeated and what is kept where a training step is interrupted: the table of ``Iteration``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rlhf_ray import PPO, PPOConfig
from rlhf_ray.algorithm import training_steps as module
from rlhf_ray.algorithm.algorithm import Algorithm
from rlhf_ray.algorithm.iteration import Iteration, Stage
from rlhf_ray.learner.remote.commands import UpdateResult
from rlhf_ray.reporting.reporter_set import ReporterSet
from rlhf_ray.span_log import SpanLog


class Parts:
    """Writes down every call; the one that is named is interrupted at its first time, after it was done."""

    def __init__(self, interrupted: str | None = None) -> None:
        self.calls: list[str] = []
        self._interrupted = interrupted
        self.controller = SimpleNamespace(collect=lambda version: self._call(f"collect {version}", self._collected()))
        self.learners = SimpleNamespace(
            turn=self._turn, packed=False, update=lambda batch, plan, *, version, **_: self._update(version)
        )
        self.weight_sync = SimpleNamespace(
            finish_interrupted=lambda: None,
            gather=lambda version: self._call(f"gather {version}"),
            deliver=lambda: self._call("deliver", "publication"),
            publish=lambda version, overlapping: self._call(f"publish {version}"),
            blocked_s=0.0,
        )

    def _call(self, name: str, answer: Any = None) -> Any:
        self.calls.append(name)
        if self._interrupted == name.split()[0]:
            self._interrupted = None
            raise KeyboardInterrupt
        return answer

    @staticmethod
    def _collected() -> Any:
        return SimpleNamespace(groups=(), spans=())

    def _update(self, version: int) -> Any:
        return self._call(f"update {version}", UpdateResult(metrics={}))

    @contextmanager
    def _turn(self) -> Iterator[None]:
        yield


@pytest.fixture
def stepping(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes an algorithm of such parts, at version 3 of its policy."""
    batch = SimpleNamespace(lengths=np.ones(4, dtype=int), loss_lengths=np.ones(4, dtype=int))
    monkeypatch.setattr(module.SequenceBatch, "from_groups", lambda *_, **__: batch)
    monkeypatch.setattr(module, "shaped", lambda batch, *_, **__: batch)
    monkeypatch.setattr(Algorithm, "_plan", lambda self, batch: SimpleNamespace())
    monkeypatch.setattr(module, "iteration_result", lambda now, **_: {"version": now.version})

    def make(interrupted: str | None = None, now: Iteration | None = None) -> Algorithm:
        algorithm: Algorithm = object.__new__(PPO)
        algorithm.settings = PPOConfig().reporting(completions_interval=0).settings
        algorithm._reporters = ReporterSet([])
        algorithm._spans = SpanLog()
        algorithm._iteration = 0
        algorithm._now = now or Iteration(version=3)
        algorithm._parts = Parts(interrupted)  # type: ignore[assignment]
        return algorithm

    return make


def calls(algorithm: Any) -> list[str]:
    return list(algorithm._parts.calls)


def test_a_step_is_four_calls(stepping: Any) -> None:
    algorithm = stepping()

    assert algorithm.training_step() == {"version": 4}

    assert calls(algorithm) == ["collect 3", "update 4", "gather 4", "deliver"]
    assert (algorithm._now.stage, algorithm.policy_version) == (Stage.DONE, 4)


@pytest.mark.parametrize(
    ("interrupted", "stage", "newest", "repeated"),
    [
        ("collect", Stage.COLLECTING, 3, ["collect 3", "update 4", "gather 4", "deliver"]),
        ("update", Stage.UPDATING, 4, ["update 4", "gather 4", "deliver"]),
        ("gather", Stage.PUBLISHING, 4, ["gather 4", "deliver"]),
        ("deliver", Stage.PUBLISHING, 4, ["gather 4", "deliver"]),
    ],
)
def test_an_interrupted_step_repeats_its_stage_alone(
    interrupted: str, stage: Stage, newest: int, repeated: list[str], stepping: Any
) -> None:
    algorithm = stepping(interrupted)
    with pytest.raises(KeyboardInterrupt):
        algorithm.training_step()
    assert (algorithm._now.stage, algorithm._now.newest_version) == (stage, newest)
    before = len(calls(algorithm))

    assert algorithm.training_step() == {"version": 4}

    assert calls(algorithm)[before:] == repeated
    assert Counter(calls(algorithm)).most_common(1)[0][1] == 2


def test_a_step_that_is_done_repeats_nothing(stepping: Any) -> None:
    algorithm = stepping()
    algorithm.training_step()
    before = calls(algorithm)

    assert algorithm.training_step() == {"version": 4}

    assert calls(algorithm) == before


def test_a_loaded_policy_is_published_before_anything_is_collected(stepping: Any) -> None:
    algorithm = stepping("publish", now=Iteration.loaded(3))
    with pytest.raises(KeyboardInterrupt):
        algorithm.training_step()
    assert algorithm._now == Iteration.loaded(3)

    algorithm.training_step()

    assert calls(algorithm) == ["publish 3", "publish 3", "collect 3", "update 4", "gather 4", "deliver"]


@pytest.mark.parametrize(("interrupted", "finished"), [("collect", False), ("update", True), ("deliver", True)])
def test_what_reads_the_learners_finishes_an_update_that_began(interrupted: str, finished: bool, stepping: Any) -> None:
    algorithm = stepping(interrupted)
    with pytest.raises(KeyboardInterrupt):
        algorithm.training_step()

    algorithm._settled()

    assert (algorithm._now.result is not None) is finished
    assert algorithm.policy_version == 3 + finished
