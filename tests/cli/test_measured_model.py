from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_ray.checkpoints.checkpoint import Checkpoint, CheckpointState
from rlhf_ray.checkpoints.folder import Folder
from rlhf_ray.cli.measured_model import MeasuredModel, eval_path, measured_model
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.types import PromptPosition


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two checkpoints and an exported model."""
    folder = tmp_path / "runs" / "first"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "config.yaml").write_text("algorithm: PPO\n")
    for iteration in (1, 2):
        checkpoint = Checkpoint(Folder.at(folder / "checkpoints" / f"iteration_{iteration:06d}"))
        checkpoint.begin()
        state = CheckpointState(
            policy_version=iteration, iteration=iteration, time_total_s=1.0, prompt_position=PromptPosition()
        )
        checkpoint.commit(config="algorithm: PPO\n", state=state, learner_files={})
    return folder


def test_a_checkpoint_a_run_and_a_model(run: Path) -> None:
    old, new = sorted((run / "checkpoints").iterdir())
    own, of_run = str(old / "config.yaml"), str(run / "config.yaml")
    assert measured_model(str(old), None) == MeasuredModel(conf=own, checkpoint=str(old))
    assert measured_model(str(run), None) == MeasuredModel(conf=of_run, checkpoint=str(new))
    model = str(run / "model")
    assert measured_model(model, None) == MeasuredModel(conf=of_run, checkpoint=None, model_path=model)


def test_a_model_without_a_run_is_measured_with_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert measured_model(str(tmp_path), None) == MeasuredModel(conf=None, checkpoint=None, model_path=str(tmp_path))


def test_a_file_and_a_checkpoint(run: Path) -> None:
    newest = str(run / "checkpoints" / "iteration_000002")
    assert measured_model("conf.yaml", None) == MeasuredModel(conf="conf.yaml", checkpoint=None)
    assert measured_model(None, newest) == MeasuredModel(conf=f"{newest}/config.yaml", checkpoint=newest)
    in_store = measured_model("conf.yaml", "s3://bucket/step")
    assert in_store == MeasuredModel(conf="conf.yaml", checkpoint="s3://bucket/step")
    assert measured_model(None, None) == MeasuredModel(conf=None, checkpoint=None)


def test_what_cannot_be_measured(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two models are named"):
        measured_model(str(run), str(run))
    with pytest.raises(ConfigError, match=r"--checkpoint = 's3://bucket/step': no config\.yaml .* name CONF\.yaml"):
        measured_model(None, "s3://bucket/step")
    with pytest.raises(ConfigError, match=r"CHECKPOINT = .* holds neither a checkpoint, a run nor a model"):
        measured_model(str(tmp_path), None)
    for manifest in run.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    with pytest.raises(DataError, match="no complete checkpoint"):
        measured_model(str(run), None)


def test_sets_are_called_by_name_or_by_file() -> None:
    assert eval_path(["gsm8k/test.jsonl", "hard=a/b=c.jsonl", "a/x=1/y.jsonl", "openai/gsm8k"]) == {
        "test": "gsm8k/test.jsonl",
        "hard": "a/b=c.jsonl",
        "y": "a/x=1/y.jsonl",
        "gsm8k": "openai/gsm8k",
    }


def test_sets_need_a_path_and_names_of_their_own() -> None:
    with pytest.raises(ConfigError, match="two sets are called test: write --data NAME=FILE"):
        eval_path(["a/test.jsonl", "b/test.jsonl"])
    with pytest.raises(ConfigError, match="a dataset's path follows the name"):
        eval_path(["name="])
