from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_ray import PPOConfig
from rlhf_ray.algorithms.resuming import RunStart, checkpoint_store, open_run, resolved_yaml
from rlhf_ray.checkpoints.checkpoint import CheckpointState
from rlhf_ray.errors import ConfigError
from rlhf_ray.prompts.order import PromptPosition

STATE = CheckpointState(policy_version=2, iteration=2, time_total_s=1.0, prompt_position=PromptPosition())


def config_of(run_dir: Path, **checkpointing: str) -> PPOConfig:
    return PPOConfig().reporting(run_dir=str(run_dir)).checkpointing(**checkpointing)


def start(config: PPOConfig) -> RunStart:
    return open_run(config.settings, algorithm="ppo", resolved=resolved_yaml(config))


def a_run(folder: Path, *, iterations: int, checkpoints: tuple[int, ...]) -> None:
    """What a run leaves that was killed: its last line is torn."""
    directory = start(config_of(folder)).directory
    lines = [json.dumps({"training_iteration": number, "x": 1}) for number in range(1, iterations + 1)]
    directory.metrics.write_text("\n".join([*lines, '{"training_iter']))
    directory.completions.mkdir()
    for number in range(1, iterations + 1):
        (directory.completions / f"step_{number:06d}.parquet").write_text("")
    for number in checkpoints:
        checkpoint = checkpoint_store(config_of(folder).settings, directory).of_iteration(number)
        checkpoint.begin()
        checkpoint.commit(config="", state=replace(STATE, iteration=number), learner_files={})


@pytest.mark.parametrize("resume", ["never", "same", "any"])
def test_a_new_folder_begins_a_run(resume: str, tmp_path: Path) -> None:
    run = start(config_of(tmp_path / "run", resume=resume))

    assert run.checkpoint is None
    assert PPOConfig.from_yaml(run.directory.config).settings == PPOConfig().settings


@pytest.mark.parametrize("resume", ["same", "any"])
def test_a_run_goes_on_from_its_newest_checkpoint(resume: str, tmp_path: Path) -> None:
    a_run(tmp_path / "run", iterations=6, checkpoints=(2, 4))

    run = start(config_of(tmp_path / "run", resume=resume))

    assert run.checkpoint is not None
    assert run.checkpoint.folder.name == "iteration_000004"
    # What is about to run again is not there twice.
    rows = [json.loads(line) for line in run.directory.metrics.read_text().splitlines()]
    assert [row["training_iteration"] for row in rows] == [1, 2, 3, 4]
    assert run.directory.last_iteration() == 4
    assert sorted(table.stem for table in run.directory.completions.iterdir())[-1] == "step_000004"


def test_a_run_without_a_complete_checkpoint_begins_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    a_run(tmp_path / "run", iterations=3, checkpoints=(2,))
    (tmp_path / "run" / "checkpoints" / "iteration_000002" / "manifest.json").unlink()

    with caplog.at_level(logging.WARNING):
        run = start(config_of(tmp_path / "run", resume="same"))

    assert run.checkpoint is None
    assert run.directory.metrics.read_text() == ""
    assert "its run begins again" in caplog.text


def test_other_settings_are_named(tmp_path: Path) -> None:
    a_run(tmp_path / "run", iterations=3, checkpoints=(2,))
    config = config_of(tmp_path / "run", resume="same").training(lr=3e-6).rollouts(group_size=16)

    with pytest.raises(ConfigError) as caught:
        start(config)

    usual = PPOConfig().settings
    assert f"rollouts.group_size is {usual.rollouts.group_size} there and 16 here; training.lr is" in str(caught.value)
    assert "3e-06 here. Choose another folder" in str(caught.value)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 3, "nothing is lost"
    start(config.checkpointing(resume="any"))
    assert PPOConfig.from_yaml(tmp_path / "run" / "config.yaml").settings.training.lr == 3e-6


def test_a_run_may_go_on_where_it_is_shown_otherwise(tmp_path: Path) -> None:
    start(config_of(tmp_path / "run").reporting(progress="live"))

    run = start(config_of(tmp_path / "run", resume="same").reporting(progress="plain"))

    assert run.checkpoint is None


def test_a_run_in_the_way_is_an_error_that_says_how_to_go_on(tmp_path: Path) -> None:
    a_run(tmp_path / "run", iterations=1, checkpoints=())

    with pytest.raises(ConfigError, match="rlhf-ray train --resume"):
        start(config_of(tmp_path / "run"))


def test_checkpoints_may_lie_elsewhere(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", path=str(tmp_path / "elsewhere"))

    assert checkpoint_store(config.settings, start(config).directory).folder.local == tmp_path / "elsewhere"
