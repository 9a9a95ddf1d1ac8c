from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import cloudpickle
from ray.tune import PlacementGroupFactory
from ray.tune.registry import get_trainable_cls

from rlhf_ray import GRPO, PPO, ConfigError, PPOConfig
from rlhf_ray.tune.trial_algorithm import TRIAL_CPUS, Trial, same_parts


def trainable(*, file_system: str = "local", resources: Any = None) -> Any:
    """What an algorithm knows of the trial that it is."""
    storage = SimpleNamespace(
        storage_filesystem=SimpleNamespace(type_name=file_system),
        trial_fs_path="/results/sweep/PPO_1_lr=0.1",
        trial_working_directory="/tmp/session/PPO_1_lr=0.1",
    )
    return SimpleNamespace(_storage=storage, trial_name="PPO_1", trial_resources=resources)


def test_outside_of_tune_there_is_no_trial() -> None:
    assert Trial.of(SimpleNamespace(_storage=None)) is None


def test_a_trial_lies_in_the_storage_where_that_is_a_folder() -> None:
    trial = Trial.of(trainable(resources=PlacementGroupFactory([{"CPU": 2.0}])))
    assert trial == Trial(name="PPO_1", folder=Path("/results/sweep/PPO_1_lr=0.1"), cpus=2.0)
    remote = Trial.of(trainable(file_system="s3"))
    assert remote == Trial(name="PPO_1", folder=Path("/tmp/session/PPO_1_lr=0.1"), cpus=TRIAL_CPUS)


def test_tune_reserves_for_the_trials_own_process_alone() -> None:
    assert PPO.default_resource_request({}).required_resources == {"CPU": TRIAL_CPUS}


TRIAL = Trial(name="PPO_1", folder=Path("/results/PPO_1_lr=0.1"), cpus=TRIAL_CPUS)


def test_folders_become_the_trials_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = PPOConfig().training(lr=0.1)
    assert TRIAL.adapted(config).settings.reporting.run_dir == "/results/PPO_1_lr=0.1/PPO_1"
    assert TRIAL.adapted(config.reporting(run_dir="runs/sweep")).settings.reporting.run_dir == str(
        tmp_path / "runs/sweep/PPO_1"
    )
    for given, own in [("checkpoints", f"{tmp_path}/checkpoints/PPO_1"), ("s3://bucket/all", "s3://bucket/all/PPO_1")]:
        adapted = TRIAL.adapted(config.copy().checkpointing(path=given))
        assert adapted.settings.checkpointing.path == own
    # The config of the other trials is another one.
    assert config.settings.reporting.run_dir == "runs/sweep"
    assert adapted.settings.training.lr == 0.1


@pytest.mark.parametrize(("given", "shown"), [("auto", "off"), ("live", "off"), ("off", "off"), ("plain", "plain")])
def test_the_console_is_tunes(given: Any, shown: str) -> None:
    assert TRIAL.adapted(PPOConfig().reporting(progress=given)).settings.reporting.progress == shown


def test_a_trial_is_resumed_by_tune_alone() -> None:
    with pytest.raises(ConfigError, match=r"checkpointing\.resume = 'any': .*Tuner\.restore"):
        TRIAL.adapted(PPOConfig().checkpointing(resume="any"))


def base() -> PPOConfig:
    return PPOConfig().data(batch_size=8).reporting(run_dir="/a")


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ({"training.lr": 1.0, "training.kl_coef": 0.1, "training.iterations": 7, "training.num_minibatches": 1}, True),
        ({"reporting.run_dir": "/b", "checkpointing.path": "/c"}, True),
        ({"evaluation.interval": 3, "callbacks.on_train_result": print}, True),
        # Replicas have room for the longest completion, and evaluation may write it; 8 are training's.
        ({"evaluation.max_new_tokens": 8}, True),
        ({"evaluation.max_new_tokens": 4}, True),
        ({"evaluation.max_new_tokens": 9}, False),
        ({"training.advantage": "grpo"}, False),
        ({"training.loss_args": {"x": 1}}, False),
        ({"training.lr": 1.0, "rollouts.temperature": 0.5}, False),
        ({"data.batch_size": 4}, False),
        ({"rewards.scale": 2.0}, False),
        ({"debugging.seed": 1}, False),
        ({"reporting.timeline_interval": 1}, False),
        ({"checkpointing.keep": 9}, False),
    ],
)
def test_processes_are_kept_where_only_what_is_not_theirs_differs(changed: dict[str, Any], same: bool) -> None:
    new = PPOConfig.from_dict({**base().to_dict(), **changed}).settings
    assert same_parts(base().settings, new) is same
    assert same_parts(base().settings, base().settings)


def test_a_copy_of_a_function_is_the_function() -> None:
    scale = 2.0

    def config(factor: float) -> PPOConfig:
        def reward(*, completions: list[str], **columns: Any) -> list[float]:
            return [factor * scale] * len(completions)

        reward.__module__ = "__main__"  # As in a script: pickled whole, and another object after each journey.
        journey = cloudpickle.loads(cloudpickle.dumps(base().rewards(reward).to_dict()))
        return PPOConfig.from_dict(journey)

    assert config(1.0).settings != config(1.0).settings
    assert same_parts(config(1.0).settings, config(1.0).settings)
    assert not same_parts(config(1.0).settings, config(3.0).settings)


def test_tune_knows_algorithms_by_name_in_every_session_of_ray() -> None:
    for _ in range(2):
        with ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False):
            assert get_trainable_cls("PPO") is PPO
            assert get_trainable_cls("GRPO") is GRPO
