from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from rlhf_ray.config.settings import ReportingSettings, Settings
from rlhf_ray.errors import ConfigError
from rlhf_ray.reporting import RunDirectory, flatten
from rlhf_ray.reporting.mlflow import MlflowReporter


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def settings(uri: str | None = None) -> Settings:
    return Settings(reporting=ReportingSettings(mlflow_experiment="arithmetic", mlflow_uri=uri))


def reported(run_dir: RunDirectory, result: dict[str, Any], uri: str | None = None) -> None:
    reporter = MlflowReporter(settings(uri), run_dir)
    reporter.report(flatten(result))
    reporter.stop()


def test_a_run_lies_in_the_run_directory_and_is_resumed_there(run_dir: RunDirectory, result: dict[str, Any]) -> None:
    reported(run_dir, result)
    # A resumed run may have other settings, which MLflow does not let change.
    run_dir.write_config("algorithm: PPO\ntraining:\n  lr: 0.5\n")
    reported(run_dir, result | {"training_iteration": 4})

    client = MlflowClient(tracking_uri=f"sqlite:///{run_dir.mlflow}")
    experiment = client.get_experiment_by_name("arithmetic")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == run_dir.name
    assert run.info.status == "FINISHED"
    assert run.data.params == {"algorithm": "PPO", "training.lr": "0.0002"}
    history = client.get_metric_history(run.info.run_id, "rollouts/reward_mean")
    assert [(metric.step, metric.value) for metric in history] == [(3, 0.5), (4, 0.5)]
    assert math.isnan(run.data.metrics["learner/value_loss"])
    assert run.data.metrics["evaluation/openai/gsm8k/reward_mean"] == 0.75
    assert "trial_id" not in run.data.metrics


def test_the_database_may_be_another_one(run_dir: RunDirectory, result: dict[str, Any], tmp_path: Path) -> None:
    reported(run_dir, result, uri=f"sqlite:///{tmp_path / 'all.db'}")
    assert not run_dir.mlflow.exists()
    assert (tmp_path / "all.db").exists()


@pytest.mark.parametrize("name", ["50%41", "what?"])
def test_a_folder_that_mlflow_cannot_open_is_a_wrong_setting(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=r"reporting\.run_dir = .* below a folder with .* set reporting\.mlflow_uri"):
        MlflowReporter(settings(), RunDirectory.at(tmp_path / name))


def test_a_folder_may_have_letters_of_any_script(tmp_path: Path, result: dict[str, Any]) -> None:
    directory = RunDirectory.create(str(tmp_path / "läuft #1 50% 実験"), algorithm="PPO")
    directory.write_config("algorithm: PPO\n")
    reported(directory, result)
    assert directory.mlflow.exists()


def test_a_server_that_cannot_be_used_is_a_wrong_setting(run_dir: RunDirectory) -> None:
    with pytest.raises(ConfigError, match="MLflow cannot use it") as caught:
        MlflowReporter(settings("nonsense://nowhere"), run_dir)
    assert caught.value.field == "reporting.mlflow_uri"


def test_where_mlflow_is_missing_the_remedy_is_named(run_dir: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match=r"install rlhf-ray\[mlflow\]"):
        MlflowReporter(settings(), run_dir)
