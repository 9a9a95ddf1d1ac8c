"""What an algorithm does differently as a Ray Tune trial, without its parts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray import PPO, Algorithm, PPOConfig
from rlhf_ray.algorithms import algorithm as module
from rlhf_ray.checkpoints.checkpoint import CheckpointState
from rlhf_ray.learner.group import StateLostError
from rlhf_ray.prompts.order import PromptPosition


@pytest.fixture
def evaluations() -> list[int]:
    """Iterations in which the held-out set was measured."""
    return []


@pytest.fixture
def bare(evaluations: list[int], monkeypatch: pytest.MonkeyPatch) -> Algorithm:
    """An algorithm that was never set up, evaluated every third iteration."""

    def evaluate(self: Algorithm) -> dict[str, Any]:
        evaluations.append(len(evaluations) + 1)
        return {"quickstart": {"reward_mean": evaluations[-1]}}

    monkeypatch.setattr(PPO, "evaluate", evaluate)
    algorithm: Algorithm = object.__new__(PPO)
    algorithm.settings = PPOConfig().evaluation(interval=3).settings
    algorithm._newest_evaluation = None
    algorithm._trial = None
    return algorithm


def said(algorithm: Algorithm, numbers: range) -> list[int | None]:
    """What each iteration says of the held-out set: the number of the evaluation."""
    found = [algorithm._evaluation_of(number) for number in numbers]
    return [None if one is None else one["quickstart"]["reward_mean"] for one in found]


def test_outside_of_tune_an_evaluation_is_reported_once(bare: Algorithm) -> None:
    assert said(bare, range(1, 8)) == [None, None, 1, None, None, 2, None]


def test_every_result_of_a_trial_has_the_metric_that_tune_asks_for(bare: Algorithm) -> None:
    bare._trial = SimpleNamespace()  # type: ignore[assignment]
    assert said(bare, range(1, 8)) == [1, 1, 2, 2, 2, 3, 3]
    bare._newest_evaluation = None  # As after a restore: those are other weights.
    assert said(bare, range(8, 10)) == [4, 5]


def test_a_trial_without_evaluations_says_nothing(bare: Algorithm) -> None:
    bare._trial = SimpleNamespace()  # type: ignore[assignment]
    bare.settings = PPOConfig().settings
    assert said(bare, range(1, 4)) == [None, None, None]


class FakeParts:
    """Writes down what is done to it, in order."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.session = None
        self.publications = SimpleNamespace(settle=lambda: None, publish=self.note("publish"))
        self.controller = SimpleNamespace(resume=self.note("resume"))
        self.learners = SimpleNamespace(renew=self.note("renew"))
        self.prompts = SimpleNamespace(restore=self.note("prompts"))

    def note(self, name: str) -> Any:
        return lambda *arguments, **options: self.calls.append((name, *arguments))


def trial_storage(folder: Path) -> Any:
    return SimpleNamespace(
        storage_filesystem=SimpleNamespace(type_name="local"),
        trial_fs_path=str(folder),
        trial_working_directory=str(folder),
    )


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Algorithm:
    """A trial whose parts only write down what is done to them."""
    parts = FakeParts()
    monkeypatch.setattr(module, "check_inputs", lambda settings: SimpleNamespace(prompts=parts.prompts))
    monkeypatch.setattr(module, "learner_spec", lambda settings, inputs, session: settings.training.lr)
    parts.prompts.state = lambda: "start"

    def start(self: Algorithm, inputs: Any) -> None:
        parts.calls.append("start")
        self._inputs = inputs
        self._parts = parts  # type: ignore[assignment]
        self._writer = SimpleNamespace(settle=lambda: None, stop=lambda: None, take_written=list)  # type: ignore[assignment]

    monkeypatch.setattr(PPO, "_start", start)
    monkeypatch.setattr(FakeParts, "stop", lambda self: self.calls.append("stop"), raising=False)
    config = PPOConfig().reporting(tensorboard=False).to_dict()
    return PPO(config=config, storage=trial_storage(tmp_path / "one"))


def test_a_trial_that_differs_in_numbers_uses_the_processes_of_the_one_before(
    running: Algorithm, tmp_path: Path
) -> None:
    running.policy_version = 7
    config = PPOConfig().training(lr=0.5).reporting(tensorboard=False).to_dict()

    assert running.reset(config, storage=trial_storage(tmp_path / "two"))

    calls = running._parts.calls  # type: ignore[union-attr]
    assert calls == ["start", ("resume", 0), ("renew", 0.5), ("prompts", "start"), ("publish", 0)]
    assert (running.policy_version, running.iteration) == (0, 0)
    assert running.run_dir == tmp_path / "two" / "default"
    assert running.settings.training.lr == 0.5
    running.log_result({"training_iteration": 1})
    assert not (tmp_path / "one" / "default" / "metrics.jsonl").read_text()
    assert (tmp_path / "two" / "default" / "metrics.jsonl").read_text()


def test_a_trial_that_differs_in_its_parts_starts_them_again(running: Algorithm, tmp_path: Path) -> None:
    config = PPOConfig().data(batch_size=4).reporting(tensorboard=False).to_dict()
    calls = running._parts.calls  # type: ignore[union-attr]

    assert running.reset(config, storage=trial_storage(tmp_path / "two"))

    assert calls == ["start", "stop", "start"]
    assert running.settings.data.batch_size == 4


def test_a_trial_that_tune_starts_anew_goes_on_in_its_folder_from_where_it_is_restored(
    running: Algorithm, tmp_path: Path
) -> None:
    for number in (1, 2, 3):
        running.log_result({"training_iteration": number})
    again = PPO(
        config=PPOConfig().training(lr=0.5).reporting(tensorboard=False).to_dict(),
        storage=trial_storage(tmp_path / "one"),
    )
    again._iteration = 2  # What a restored checkpoint says.
    again._go_on_reporting()
    again.log_result({"training_iteration": 3, "new": 1})
    again._go_on_reporting()
    lines = [json.loads(line) for line in (tmp_path / "one" / "default" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["training_iteration"], line.get("new")) for line in lines] == [(1, None), (2, None), (3, 1)]
    assert PPOConfig.from_yaml(again.run_dir / "config.yaml").settings.training.lr == 0.5


def test_a_rewind_takes_the_checkpoint_that_is_still_being_written(running: Algorithm) -> None:
    calls: list[Any] = running._parts.calls  # type: ignore[union-attr]
    calls.clear()
    state = CheckpointState(policy_version=5, iteration=4, time_total_s=9.0, prompt_position=PromptPosition(row=32))
    checkpoint = SimpleNamespace(folder="iteration_000004", learner="learner", state=lambda: state)
    running._writer = SimpleNamespace(settle=lambda: calls.append("settle"))  # type: ignore[assignment]
    running._store = SimpleNamespace(newest=lambda: checkpoint if "settle" in calls else None)  # type: ignore[assignment]
    running._parts.learners.load = running._parts.note("load")  # type: ignore[attr-defined, union-attr, method-assign]
    running.policy_version = 7

    running._rewind(StateLostError("gone"))

    done = [call for call in calls if call != "settle"]
    assert done == [("resume", 8), ("load", "learner", 8), ("prompts", state.prompt_position), ("publish", 8)]
    assert (running.policy_version, running.iteration) == (8, 4)
