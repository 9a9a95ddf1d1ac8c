"""The algorithm around its parts, which only write down what is done to them."""

from __future__ import annotations

import json
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rlhf_ray import GRPO, PPO, Algorithm, GRPOConfig, PPOConfig
from rlhf_ray.algorithm import algorithm as module
from rlhf_ray.algorithm.iteration import Iteration, Stage
from rlhf_ray.algorithm.run_checkpoints import RunCheckpoints
from rlhf_ray.checkpoints.checkpoint import CheckpointState
from rlhf_ray.errors import ConfigError, LearnerError
from rlhf_ray.learner.remote.group import StateLostError
from rlhf_ray.reporting.reporter_set import ReporterSet
from rlhf_ray.reporting.run_directory import RunLock
from rlhf_ray.span_log import SpanLog
from rlhf_ray.tune import trial_algorithm as trial_module
from rlhf_ray.types import Prompt, PromptPosition, RolloutGroup, ScoredGroup, Trajectory


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
    algorithm._reporters = ReporterSet([])
    algorithm._spans = SpanLog()
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


def test_what_a_callback_edits_does_not_change_the_update(bare: Algorithm) -> None:
    def spoil(*, algorithm: Algorithm, group: ScoredGroup) -> None:
        assert algorithm is bare
        group.rewards[:] = 9.0
        group.group.trajectories[0].token_ids[:] = 0
        group.group.prompt.columns["tests"].clear()

    prompt = Prompt(prompt_id=0, token_ids=np.ones(1, dtype=np.int32), text="", columns={"tests": [1]})
    ids, logprobs = np.ones(2, dtype=np.int32), np.zeros(2, dtype=np.float32)
    completion = Trajectory.single_turn(
        token_ids=ids, sampling_logprobs=logprobs, version_spans=(), asked_version=0, finish_reason="stop"
    )
    group = RolloutGroup(group_id=0, prompt=prompt, trajectories=(completion,), replica_id="r")
    rewards = np.ones(1, dtype=np.float32)
    scored = ScoredGroup(group=group, rewards=rewards, rewards_by_function={}, texts=("",), reward_s=0.0)
    bare.settings = PPOConfig().callbacks(on_rollout_group=spoil).settings

    bare._show_groups((scored,))

    assert (rewards.tolist(), ids.tolist(), prompt.columns) == ([1.0], [1, 1], {"tests": [1]})


def test_a_trial_without_evaluations_says_nothing(bare: Algorithm) -> None:
    bare._trial = SimpleNamespace()  # type: ignore[assignment]
    bare.settings = PPOConfig().settings
    assert said(bare, range(1, 4)) == [None, None, None]


def test_a_delivery_that_was_interrupted_is_finished_before_the_learners_turn(bare: Algorithm) -> None:
    calls: list[str] = []

    def turn() -> Any:
        calls.append("turn")
        raise KeyboardInterrupt

    bare._iteration = 0
    bare._now = Iteration(collected=SimpleNamespace(groups=()))  # type: ignore[arg-type]
    bare._parts = SimpleNamespace(  # type: ignore[assignment]
        weight_sync=SimpleNamespace(finish_interrupted=lambda: calls.append("finished")),
        learners=SimpleNamespace(turn=turn),
    )
    bare._plan = lambda batch: calls.append("planned")  # type: ignore[assignment, return-value, func-returns-value]
    with pytest.raises(KeyboardInterrupt):
        bare.update(None)  # type: ignore[arg-type]
    # What needs no learner is done before: engines that share their GPUs wait for the turn.
    assert calls == ["finished", "planned", "turn"]


def test_a_class_derived_from_algorithm_may_be_a_trial() -> None:
    class Own(Algorithm):
        config_class = PPOConfig

    assert Own.default_resource_request({}).required_resources == {"CPU": 0.1}
    assert {"save_checkpoint", "load_checkpoint", "reset_config"} <= set(vars(Own.__mro__[1]))
    assert issubclass(PPO, Algorithm)


class FakeParts:
    """Writes down what is done to it, in order."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.session = SimpleNamespace(placement=SimpleNamespace(device=None))
        self.weight_sync = SimpleNamespace(wait_pending=lambda: None, publish=self.note("publish"), new_replicas=0)
        self.controller = SimpleNamespace(
            resume=self.note("resume"),
            prompt_position=lambda version: PromptPosition(row=version),
            retries=0,
        )
        self.learners = SimpleNamespace(
            renew=self.note("renew"), load=self.note("load"), save=lambda folder: dict, restarts=0
        )
        self.prompts = SimpleNamespace(restore=self.note("prompts"), num_rows=640, dropped=0)
        self.rewards = SimpleNamespace(workers_replaced=0)

    def note(self, name: str) -> Any:
        return lambda *arguments, **options: self.calls.append((name, *arguments))


def trial_storage(folder: Path) -> Any:
    return SimpleNamespace(
        storage_filesystem=SimpleNamespace(type_name="local"),
        trial_fs_path=str(folder),
        trial_working_directory=str(folder),
    )


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> FakeParts:
    """What every algorithm of the test starts; it only writes down what is done to it."""
    parts = FakeParts()
    monkeypatch.setattr(module, "check_inputs", lambda settings: SimpleNamespace(prompts=parts.prompts, held_out={}))
    monkeypatch.setattr(trial_module, "learner_spec", lambda settings, inputs, device: settings.training.lr)
    parts.prompts.state = lambda: "start"

    def start(self: Algorithm, inputs: Any) -> None:
        parts.calls.append("start")
        self._inputs = inputs
        self._parts = parts  # type: ignore[assignment]
        self._checkpoints = RunCheckpoints(self.settings, self._run, self._parts)  # type: ignore[arg-type]

    monkeypatch.setattr(Algorithm, "_start", start)
    monkeypatch.setattr(FakeParts, "stop", lambda self: self.calls.append("stop"), raising=False)
    return parts


@pytest.fixture
def running(parts: FakeParts, tmp_path: Path) -> Algorithm:
    """A trial of such parts."""
    config = PPOConfig().reporting(tensorboard=False).to_dict()
    return PPO(config=config, storage=trial_storage(tmp_path / "one"))


def test_a_trial_that_differs_in_numbers_uses_the_processes_of_the_one_before(
    running: Algorithm, tmp_path: Path
) -> None:
    running._now = Iteration(version=7)
    config = PPOConfig().training(lr=0.5, iterations=50).reporting(tensorboard=False).to_dict()

    assert running.reset(config, storage=trial_storage(tmp_path / "two"))

    # By default four optimizer steps and 64 prompts an iteration.
    state = running._parts.rewards.progress.at(5)  # type: ignore[union-attr]
    assert (state.global_step, state.max_steps, state.epoch) == (20, 200, 0.5)

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


def test_a_trial_that_tune_restarts_continues_in_its_folder_from_where_it_is_restored(
    running: Algorithm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2, 3):
        running.log_result({"training_iteration": number})
    running.stop()
    again = PPO(
        config=PPOConfig().training(lr=0.5).reporting(tensorboard=False).to_dict(),
        storage=trial_storage(tmp_path / "one"),
    )
    again._iteration = 2  # What a restored checkpoint says.
    monkeypatch.setattr("rlhf_ray.algorithm.algorithm.Algorithm.step", lambda self: {})
    again.step()
    again.log_result({"training_iteration": 3, "new": 1})
    again.step()
    lines = [json.loads(line) for line in (tmp_path / "one" / "default" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["training_iteration"], line.get("new")) for line in lines] == [(1, None), (2, None), (3, 1)]
    assert PPOConfig.from_yaml(again.run_dir / "config.yaml").settings.training.lr == 0.5


@pytest.mark.parametrize(("stage", "version"), [(Stage.COLLECTING, 8), (Stage.UPDATING, 9), (Stage.PUBLISHING, 8)])
def test_a_rewind_takes_the_checkpoint_that_is_still_being_written(
    running: Algorithm, stage: Stage, version: int
) -> None:
    calls: list[Any] = running._parts.calls  # type: ignore[union-attr]
    calls.clear()
    state = CheckpointState(policy_version=5, iteration=4, time_total_s=9.0, prompt_position=PromptPosition(row=32))
    checkpoint = SimpleNamespace(folder="iteration_000004", learner="learner", state=lambda: state)
    running._checkpoints._writer = SimpleNamespace(wait_pending=lambda: calls.append("settle"))  # type: ignore[assignment]
    store: Any = SimpleNamespace(newest=lambda: checkpoint if "settle" in calls else None)
    running._checkpoints._run = replace(running._run, store=store)
    running._now = Iteration(version=7, stage=stage)

    running._rewind(StateLostError("gone"))

    done = [call for call in calls if call != "settle"]
    assert done == [
        ("resume", version),
        ("load", "learner", version),
        ("prompts", state.prompt_position),
        ("publish", version),
    ]
    assert (running.policy_version, running.iteration) == (version, 4)
    assert running._now == Iteration(version=version)


def run_config(folder: Path, **checkpointing: Any) -> PPOConfig:
    config = PPOConfig().reporting(run_dir=str(folder), tensorboard=False, progress="off")
    return config.checkpointing(**checkpointing)


def build(config: PPOConfig) -> Algorithm:
    return PPO(config=config)


def iterate(algorithm: Algorithm, last: int, **result: Any) -> None:
    """Iterations up to one, each with its checkpoint."""
    while algorithm.iteration < last:
        number = algorithm.iteration + 1
        result |= {"training_iteration": number}
        state = algorithm._checkpoints.state(algorithm.policy_version, number, 1.0)
        algorithm._checkpoints.begin(state, result)
        algorithm._checkpoints.wait_pending()
        algorithm._iteration = number
        algorithm.log_result(result)


def reported(folder: Path) -> list[int]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["training_iteration"] for line in lines]


@pytest.mark.parametrize("fails", ["start", "load"])
def test_a_resume_that_fails_changes_nothing(
    fails: str, parts: FakeParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(run_config(tmp_path / "run", interval=1))
    iterate(first, 2)
    first.log_result({"training_iteration": 3})
    first.stop()
    before = (tmp_path / "run" / "config.yaml").read_text()

    def fail(*_: Any) -> None:
        raise ConfigError("learners.num_learners", 16, "the cluster has 2 CPUs")

    with monkeypatch.context() as patched:
        patched.setattr(PPO, "_start" if fails == "start" else "_resume", fail)
        with pytest.raises(ConfigError, match="the cluster has 2 CPUs"):
            build(run_config(tmp_path / "run", interval=1, resume="any").learners(num_learners=16))
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    assert reported(tmp_path / "run") == [1, 2, 3]

    again = build(run_config(tmp_path / "run", interval=1, resume="any").training(lr=0.5))
    assert again.iteration == 2
    assert reported(tmp_path / "run") == [1, 2]
    again.log_result({"training_iteration": 3})
    again.stop()
    assert reported(tmp_path / "run") == [1, 2, 3]
    assert PPOConfig.from_yaml(tmp_path / "run" / "config.yaml").settings.training.lr == 0.5


def test_a_run_that_begins_again_keeps_what_it_had_reported(parts: FakeParts, tmp_path: Path) -> None:
    first = build(run_config(tmp_path / "run", interval=5))
    first.log_result({"training_iteration": 1})
    first.stop()

    again = build(run_config(tmp_path / "run", interval=5, resume="same"))
    again.log_result({"training_iteration": 1})
    again.stop()

    assert reported(tmp_path / "run") == reported(tmp_path / "run" / "before-1") == [1]


def test_a_second_algorithm_in_a_run_directory_is_kept_out_until_the_first_stops(
    parts: FakeParts, tmp_path: Path
) -> None:
    first = build(run_config(tmp_path / "run", interval=1))
    iterate(first, 1)
    other = build(run_config(tmp_path / "other"))
    with pytest.raises(ConfigError, match="is writing this run"):
        build(run_config(tmp_path / "run", interval=1, resume="same"))
    first.log_result({"training_iteration": 2})
    assert reported(tmp_path / "run") == [1, 2]

    first.stop()
    build(run_config(tmp_path / "run", interval=1, resume="same")).stop()
    other.stop()


def test_a_trial_in_the_same_processes_keeps_its_lock(running: Algorithm, tmp_path: Path) -> None:
    for name in ("one", "two", "two"):
        config = PPOConfig().training(lr=0.5).reporting(tensorboard=False).to_dict()
        assert running.reset(config, storage=trial_storage(tmp_path / name))
    RunLock.take(tmp_path / "one" / "default").release()
    with pytest.raises(ConfigError, match="is writing this run"):
        RunLock.take(tmp_path / "two" / "default")
    running.stop()


@pytest.mark.parametrize(("score", "kept"), [(0.5, 0.5), (math.nan, None), (math.inf, None), ("text", None)])
def test_a_score_is_a_number_with_its_name(score: Any, kept: float | None, parts: FakeParts, tmp_path: Path) -> None:
    algorithm = build(run_config(tmp_path / "run", interval=1, best_metric="rollouts/reward_mean"))
    iterate(algorithm, 1, rollouts={"reward_mean": score})
    algorithm.stop()

    state = algorithm._run.store.of_iteration(1).read()
    assert (state.score, state.metric) == (kept, None if kept is None else "rollouts/reward_mean")
    assert state.run_id == (tmp_path / "run" / "run_id").read_text()


def test_a_checkpoint_continues_in_a_new_run_that_leaves_the_other_alone(parts: FakeParts, tmp_path: Path) -> None:
    first = build(run_config(tmp_path / "first", interval=1, path=str(tmp_path / "all"), keep=5))
    iterate(first, 4)
    first.stop()
    places = sorted((tmp_path / "all" / "first").iterdir())
    assert len(places) == 4

    config = PPOConfig.from_yaml(places[1] / "config.yaml").reporting(run_dir=str(tmp_path / "second"))
    second = PPO.from_checkpoint(places[1], config=config.checkpointing(keep=1))
    assert second.iteration == 2
    iterate(second, 3)
    second.stop()

    assert [place for place in places if (place / "manifest.json").exists()] == places
    newest = second._run.store.newest()
    assert newest is not None
    assert newest.folder.local == tmp_path / "all" / "first" / "second" / "iteration_000003"


def test_the_base_class_builds_the_algorithm_that_wrote_the_checkpoint(parts: FakeParts, tmp_path: Path) -> None:
    written = run_config(tmp_path / "first", interval=1).settings
    config = GRPOConfig().reporting(run_dir=written.reporting.run_dir, tensorboard=False).checkpointing(interval=1)
    first = GRPO(config=config)
    iterate(first, 2)
    first.stop()
    place = tmp_path / "first" / "checkpoints" / "iteration_000002"

    again = Algorithm.from_checkpoint(place)
    again.stop()

    assert (type(again), again.iteration) == (GRPO, 2)
    assert again.settings.training.advantage == "grpo"
    with pytest.raises(ConfigError, match="read them with GRPOConfig"):
        PPO.from_checkpoint(place)


def test_the_base_class_is_the_algorithm_of_the_config_that_it_is_given(parts: FakeParts, tmp_path: Path) -> None:
    algorithm = Algorithm(config=GRPOConfig().reporting(run_dir=str(tmp_path / "run"), tensorboard=False))
    algorithm.stop()
    assert algorithm.settings.training.advantage == "grpo"
    assert (tmp_path / "run" / "config.yaml").read_text().startswith("algorithm: GRPO")


# --- how a run ends ---


def test_a_stop_that_fails_hides_no_error_and_leaves_the_directory_free(
    parts: FakeParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: FakeParts) -> None:
        raise TimeoutError("the application was not deleted after 60s")

    monkeypatch.setattr(FakeParts, "stop", fail)
    algorithm = build(run_config(tmp_path / "run"))
    algorithm._checkpoints._writer.stop = fail.__get__(parts)  # type: ignore[method-assign]
    with pytest.raises(LearnerError, match="the cause"):
        try:
            raise LearnerError("the cause")
        finally:
            algorithm.stop()
    assert caplog.text.count("stopping failed (TimeoutError") == 2
    RunLock.take(tmp_path / "run").release()


def test_an_interrupted_stop_releases_the_rest(
    parts: FakeParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: FakeParts) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeParts, "stop", interrupt)
    algorithm = build(run_config(tmp_path / "run"))
    with pytest.raises(KeyboardInterrupt):
        algorithm.stop()
    RunLock.take(tmp_path / "run").release()
    algorithm.stop()


def test_at_the_end_of_a_script_every_algorithm_is_stopped(
    parts: FakeParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithms = [build(run_config(tmp_path / name)) for name in ("one", "two")]
    monkeypatch.setattr(module, "_LIVE", set(algorithms))
    monkeypatch.setattr(PPO, "stop", lambda self: parts.calls.append("stop") or 1 / 0)
    module._stop_all()
    assert parts.calls.count("stop") == 2


def test_a_trial_that_cannot_be_taken_over_leaves_nothing(
    running: Algorithm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = running._parts.calls  # type: ignore[union-attr]

    def fail(*_: Any) -> None:
        raise LearnerError("out of memory")

    running._parts.learners.renew = fail  # type: ignore[method-assign, union-attr]
    with pytest.raises(LearnerError, match="out of memory"):
        running.reset_config(PPOConfig().training(lr=0.5).reporting(tensorboard=False).to_dict())
    assert calls[-1] == "stop"
    running.stop()


def test_a_start_that_failed_can_be_repeated_with_the_same_command(
    parts: FakeParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ConfigError("TMPDIR", "/scratch/...", "too long")

    with monkeypatch.context() as patched:
        patched.setattr(PPO, "_start", fail)
        with pytest.raises(ConfigError, match="too long"):
            build(run_config(tmp_path / "run"))
    algorithm = build(run_config(tmp_path / "run"))
    algorithm.log_result({"training_iteration": 1})
    algorithm.stop()
    with pytest.raises(ConfigError, match="already holds a run"):
        build(run_config(tmp_path / "run"))


def test_algorithms_built_in_threads_check_their_inputs_in_turn(
    parts: FakeParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checking = threading.Lock()

    def check(settings: Any) -> Any:
        assert checking.acquire(blocking=False), "two threads import transformers at once"
        time.sleep(0.05)
        checking.release()
        return SimpleNamespace(prompts=parts.prompts, held_out={})

    monkeypatch.setattr(module, "check_inputs", check)
    with ThreadPoolExecutor(3) as threads:
        algorithms = list(threads.map(lambda name: build(run_config(tmp_path / name)), "abc"))
    for algorithm in algorithms:
        algorithm.stop()


def test_learners_that_read_slices_share_a_plan_of_larger_microbatches() -> None:
    config = PPOConfig().learners(num_learners=4, sequence_parallel=2, max_tokens_per_microbatch=50)
    algorithm: Any = SimpleNamespace(
        settings=config.training(num_minibatches=1).settings,
        _inputs=SimpleNamespace(model_config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=64))),
        _running=lambda: SimpleNamespace(learners=SimpleNamespace(packed=True)),
        _now=Iteration(version=1),
    )
    lengths = np.full(8, 50)
    batch: Any = SimpleNamespace(
        lengths=lengths, loss_lengths=lengths // 2, of_trajectory=np.arange(8), successful=np.zeros(8, dtype=bool)
    )

    plan = module.Algorithm._plan(algorithm, batch)

    assert len(plan.ranks) == 2
    # 100 tokens in one pass of two learners.
    assert [len(part) for rank in plan.ranks for part in rank.minibatches[0].microbatches] == [2, 2, 2, 2]
    assert sorted(index for rank in plan.ranks for index in rank.sequences) == list(range(8))
