from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_ray import PPOConfig
from rlhf_ray.algorithm.resuming import RunStart, check_same, open_run, open_trial_run, resolved_yaml
from rlhf_ray.checkpoints.checkpoint import CheckpointState, CheckpointStore
from rlhf_ray.checkpoints.folder import Folder
from rlhf_ray.errors import ConfigError
from rlhf_ray.reporting.run_directory import RunDirectory, RunLock
from rlhf_ray.types import PromptPosition

STATE = CheckpointState(policy_version=2, iteration=2, time_total_s=1.0, prompt_position=PromptPosition())


def config_of(run_dir: Path, **checkpointing: Any) -> PPOConfig:
    return PPOConfig().reporting(run_dir=str(run_dir)).checkpointing(**checkpointing)


def start(config: PPOConfig) -> RunStart:
    """Open a run whose driver is gone when the next one is opened."""
    run = open_run(config)
    run.lock.release()
    return run


def adopted(run: RunStart) -> RunDirectory:
    """What the Algorithm does when the parts are up and the checkpoint is loaded."""
    run.adopt_run(0 if run.checkpoint is None else run.checkpoint.state().iteration)
    return run.directory


def save(run: RunStart, *iterations: int) -> None:
    for iteration in iterations:
        checkpoint = run.store.of_iteration(iteration)
        checkpoint.begin()
        state = replace(STATE, iteration=iteration, run_id=run.store.run_id)
        checkpoint.commit(config=run.resolved, state=state, learner_files={})


def report(directory: RunDirectory, iterations: int) -> None:
    """What a run leaves that was killed: its last line is torn."""
    lines = [json.dumps({"training_iteration": number, "x": 1}) for number in range(1, iterations + 1)]
    directory.metrics.write_text("\n".join([*lines, '{"training_iter']))
    directory.completions.mkdir()
    for number in range(1, iterations + 1):
        (directory.completions / f"step_{number:06d}.parquet").write_text("")


def a_run(folder: Path, *, iterations: int, checkpoints: tuple[int, ...], **checkpointing: Any) -> RunStart:
    run = start(config_of(folder, **checkpointing))
    report(run.directory, iterations)
    save(run, *checkpoints)
    return run


def names_of_checkpoints(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.glob("iteration_*"))


@pytest.fixture
def working_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that relative paths are those of."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "here"


@pytest.mark.parametrize("resume", ["never", "same", "any"])
def test_a_new_folder_begins_a_run(resume: str, tmp_path: Path) -> None:
    run = start(config_of(tmp_path / "run", resume=resume))

    assert run.checkpoint is None
    assert not run.resumes
    assert PPOConfig.from_yaml(run.directory.config).settings == PPOConfig().settings


@pytest.mark.parametrize("resume", ["same", "any"])
def test_a_run_continues_from_its_newest_checkpoint(resume: str, tmp_path: Path) -> None:
    a_run(tmp_path / "run", iterations=6, checkpoints=(2, 4))

    run = start(config_of(tmp_path / "run", resume=resume))

    assert run.checkpoint is not None
    assert run.checkpoint.folder.name == "iteration_000004"
    directory = adopted(run)
    # What is about to run again is not there twice.
    rows = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    assert [row["training_iteration"] for row in rows] == [1, 2, 3, 4]
    assert directory.last_iteration() == 4
    assert sorted(table.stem for table in directory.completions.iterdir())[-1] == "step_000004"


def test_until_the_run_continues_the_directory_tells_of_the_run_before(tmp_path: Path) -> None:
    a_run(tmp_path / "run", iterations=6, checkpoints=(2, 4))
    files = [tmp_path / "run" / name for name in ("config.yaml", "metrics.jsonl")]
    before = [file.read_text() for file in files]

    # Too many learners for the cluster, for one: the Algorithm never comes to take the run up.
    run = start(config_of(tmp_path / "run", resume="any").learners(num_learners=16))

    assert [file.read_text() for file in files] == before
    assert len(list((tmp_path / "run" / "completions").iterdir())) == 6
    config = PPOConfig.from_yaml(adopted(run).config)
    assert config.settings.learners.num_learners == 16


@pytest.mark.parametrize("content", ["", "# nothing\n", "a: [", None])
@pytest.mark.parametrize("resume", ["same", "any"])
def test_settings_that_are_lost_are_not_the_defaults(content: str | None, resume: str, tmp_path: Path) -> None:
    a_run(tmp_path / "run", iterations=2, checkpoints=(2,))
    (tmp_path / "run" / "config.yaml").unlink()
    if content is not None:
        (tmp_path / "run" / "config.yaml").write_text(content)

    with pytest.raises(ConfigError, match=r"config\.yaml holds no settings; copy that of a checkpoint"):
        start(config_of(tmp_path / "run", resume=resume))


# --- runs without a checkpoint ---


@pytest.mark.parametrize("resume", ["never", "same", "any"])
@pytest.mark.parametrize("path", [None, "all"])
def test_a_start_that_failed_leaves_the_folder_to_the_next_one(
    resume: str, path: str | None, working_dir: Path
) -> None:
    settings: dict[str, Any] = {"resume": resume, "path": path, "interval": 1}
    first = start(config_of(working_dir / "run", **settings))
    first.directory.metrics.touch()  # What reporters leave that were started.

    # With other settings too: those may have been the reason.
    again = start(config_of(working_dir / "run", **settings).training(lr=0.5))

    assert (again.resumes, again.checkpoint, again.directory) == (False, None, first.directory)
    assert PPOConfig.from_yaml(again.directory.config).settings.training.lr == 0.5


@pytest.mark.parametrize("path", [None, "all"])
def test_a_run_that_ended_between_its_first_checkpoint_and_its_first_report_continues(
    path: str | None, working_dir: Path
) -> None:
    save(start(config_of(working_dir / "run", path=path, interval=1)), 1)
    with pytest.raises(ConfigError, match="holds"):
        start(config_of(working_dir / "run", path=path, interval=1))
    again = start(config_of(working_dir / "run", path=path, interval=1, resume="same"))
    assert again.checkpoint is not None


def test_a_job_that_ended_before_its_first_checkpoint_begins_again_and_loses_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a_run(tmp_path / "run", iterations=3, checkpoints=(2,), interval=2)
    (tmp_path / "run" / "checkpoints" / "iteration_000002" / "manifest.json").unlink()

    with caplog.at_level(logging.WARNING):
        run = start(config_of(tmp_path / "run", resume="same", interval=2))
        directory = adopted(run)

    assert run.checkpoint is None
    assert not directory.metrics.exists()
    assert not directory.completions.exists()
    aside = tmp_path / "run" / "before-1"
    assert aside.joinpath("metrics.jsonl").read_text().startswith('{"training_iteration": 1')
    assert len(list((aside / "completions").iterdir())) == 3
    assert f"no complete checkpoint in {tmp_path}/run/checkpoints; the run begins again" in caplog.text
    assert f"what it had reported is in {aside}" in caplog.text
    report(directory, 1)
    adopted(start(config_of(tmp_path / "run", resume="same", interval=2)))
    assert (tmp_path / "run" / "before-2" / "metrics.jsonl").exists()


def test_a_run_whose_checkpoints_are_lost_does_not_begin_again_by_itself(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", iterations=4, checkpoints=(2, 4), interval=2)
    run.store.folder.delete()

    with pytest.raises(ConfigError, match="it reported 4 iterations, and there is no complete checkpoint") as caught:
        start(config_of(tmp_path / "run", resume="same", interval=2))

    assert f"of it in {tmp_path}/run/checkpoints to resume from" in str(caught.value)


@pytest.mark.parametrize("iterations", [1, 3])
def test_a_resume_by_hand_needs_a_checkpoint(iterations: int, tmp_path: Path) -> None:
    a_run(tmp_path / "run", iterations=iterations, checkpoints=())
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()

    with pytest.raises(ConfigError, match=r"checkpointing\.path; to begin again, name another run directory"):
        start(config_of(tmp_path / "run", resume="any"))

    assert (tmp_path / "run" / "metrics.jsonl").read_text() == metrics


@pytest.mark.parametrize("resume", ["same", "any"])
def test_a_run_that_reported_nothing_begins_again(resume: str, tmp_path: Path) -> None:
    start(config_of(tmp_path / "run"))

    run = start(config_of(tmp_path / "run", resume=resume))

    assert run.checkpoint is None
    adopted(run)
    assert not (tmp_path / "run" / "before-1").exists()


# --- settings ---


@pytest.mark.parametrize(("kept", "interval"), [(True, 1), (False, 0)])
def test_a_run_of_an_earlier_version_continues(kept: bool, interval: int, tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", iterations=3, checkpoints=(2,))
    settings = yaml.safe_load(run.directory.config.read_text())
    # Its folder names a setting that is gone, and not those that have come.
    del settings["fault_tolerance"]["state_interval"], settings["learners"]["sequence_parallel"]
    del settings["resources"]["colocate"]
    settings["fault_tolerance"]["keep_learner_state"] = kept
    run.directory.config.write_text(yaml.safe_dump(settings))

    again = PPOConfig.from_yaml(run.directory.config)
    assert again.settings.fault_tolerance.state_interval == interval
    again.reporting(run_dir=str(tmp_path / "run")).checkpointing(resume="same")
    assert start(again.copy()).checkpoint is not None
    with pytest.raises(ConfigError, match=f"state_interval is {interval} there and 7 here"):
        start(again.copy().fault_tolerance(state_interval=7))
    with pytest.raises(ConfigError, match="sequence_parallel is 1 there and 2 here"):
        start(again.copy().learners(num_learners=2, sequence_parallel=2))


def test_other_settings_are_named(tmp_path: Path) -> None:
    a_run(tmp_path / "run", iterations=3, checkpoints=(2,))
    config = config_of(tmp_path / "run", resume="same").training(lr=3e-6).rollouts(group_size=16)

    with pytest.raises(ConfigError) as caught:
        start(config)

    usual = PPOConfig().settings
    assert f"rollouts.group_size is {usual.rollouts.group_size} there and 16 here; training.lr is" in str(caught.value)
    assert "3e-06 here. Choose another folder" in str(caught.value)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 3, "nothing is lost"
    adopted(start(config.checkpointing(resume="any")))
    assert PPOConfig.from_yaml(tmp_path / "run" / "config.yaml").settings.training.lr == 3e-6


def test_a_run_may_go_on_where_it_is_shown_otherwise(tmp_path: Path) -> None:
    start(config_of(tmp_path / "run").reporting(progress="live"))

    run = start(config_of(tmp_path / "run", resume="same").reporting(progress="plain"))

    assert run.checkpoint is None


def test_a_run_in_the_way_is_an_error_that_says_how_to_go_on(tmp_path: Path) -> None:
    a_run(tmp_path / "run", iterations=1, checkpoints=())

    with pytest.raises(ConfigError, match="rlhf-ray train --resume"):
        start(config_of(tmp_path / "run"))


# --- one place of several runs ---


def test_runs_that_name_one_place_have_a_folder_each(tmp_path: Path) -> None:
    shared = str(tmp_path / "all")
    first = a_run(tmp_path / "runs" / "first", iterations=9, checkpoints=(8, 9), path=shared)
    second = a_run(tmp_path / "runs" / "second", iterations=3, checkpoints=(2, 3), path=shared)

    second.store.prune(keep=1, keep_best=1, highest_is_best=True)

    assert names_of_checkpoints(tmp_path / "all" / "first") == ["iteration_000008", "iteration_000009"]
    assert names_of_checkpoints(tmp_path / "all" / "second") == ["iteration_000003"]
    assert first.store.run_id != second.store.run_id
    for resume in ("same", "any"):
        run = start(config_of(tmp_path / "runs" / "second", resume=resume, path=shared))
        assert run.checkpoint is not None
        assert run.checkpoint.folder.local == tmp_path / "all" / "second" / "iteration_000003"


def test_the_settings_of_a_run_name_its_own_folder(tmp_path: Path) -> None:
    """The command line goes on with these, and evaluates what they lead to; a script reruns them elsewhere."""
    a_run(tmp_path / "runs" / "first", iterations=2, checkpoints=(2,), path=str(tmp_path / "all"))
    own = tmp_path / "all" / "first"
    config = PPOConfig.from_yaml(tmp_path / "runs" / "first" / "config.yaml")
    assert config.settings.checkpointing.path == str(own)

    run = start(config.copy().reporting(run_dir=str(tmp_path / "runs" / "first")).checkpointing(resume="any"))
    assert run.store.folder.local == own
    assert run.checkpoint is not None

    other = start(config.copy().reporting(run_dir=str(tmp_path / "runs" / "second")))
    assert other.store.folder.local == own / "second"
    assert other.store.newest() is None


def test_a_place_does_not_depend_on_the_working_directory(
    working_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(tmp_path / "run", iterations=2, checkpoints=(2,), path="all")
    assert run.store.folder.local == working_dir / "all" / "run"
    monkeypatch.chdir(tmp_path)

    config = PPOConfig.from_yaml(run.directory.config).reporting(run_dir=str(run.directory.path))
    assert config.settings.checkpointing.path == str(working_dir / "all" / "run")
    assert start(config.checkpointing(resume="any")).checkpoint is not None


def test_a_run_of_the_same_name_is_refused_the_others_folder(tmp_path: Path) -> None:
    shared = str(tmp_path / "all")
    a_run(tmp_path / "a" / "run", iterations=2, checkpoints=(2,), path=shared, interval=2)

    with pytest.raises(ConfigError, match=r"all/run holds checkpoints of another run; give this one") as caught:
        start(config_of(tmp_path / "b" / "run", path=shared, interval=2))

    assert caught.value.field == "reporting.run_dir"
    assert not RunDirectory.holds_a_run(str(tmp_path / "b" / "run"))


def test_a_renamed_run_finds_its_folder(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", iterations=2, checkpoints=(2,), path=str(tmp_path / "all"))
    run.directory.path.rename(tmp_path / "renamed")

    config = PPOConfig.from_yaml(tmp_path / "renamed" / "config.yaml").reporting(run_dir=str(tmp_path / "renamed"))
    run = start(config.checkpointing(resume="any"))

    assert run.checkpoint is not None
    assert run.store.folder.local == tmp_path / "all" / "run"


@pytest.mark.parametrize("path", [None, "all"])
def test_a_run_from_before_runs_had_ids_continues(path: str | None, tmp_path: Path, working_dir: Path) -> None:
    config = config_of(tmp_path / "run", path=path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(resolved_yaml(config))
    folder = tmp_path / "run" / "checkpoints" if path is None else working_dir / "all"
    checkpoint = CheckpointStore(Folder.at(folder)).of_iteration(2)
    checkpoint.begin()
    checkpoint.commit(config="", state=STATE, learner_files={})
    (folder / "iteration_000004").mkdir()

    for resume in ("same", "any"):
        run = start(config.copy().checkpointing(resume=resume))
        assert run.checkpoint == checkpoint
    save(run, 6)
    assert run.store.newest() == run.store.of_iteration(6)
    run.store.prune(keep=1, keep_best=1, highest_is_best=True)
    # In a place that other runs may write to, it is not known whose that is.
    left = ["iteration_000006"] if path is None else ["iteration_000004", "iteration_000006"]
    assert names_of_checkpoints(folder) == left


def test_a_place_that_is_given_with_its_options_stays_a_uri(tmp_path: Path) -> None:
    run = start(config_of(tmp_path / "run", path="s3://bucket/all?endpoint_override=minio:9000&scheme=http"))

    own = "s3://bucket/all/run?endpoint_override=minio:9000&scheme=http"
    assert run.store.folder.location == own
    assert yaml.safe_load(run.directory.config.read_text())["checkpointing"]["path"] == own


def test_another_place_is_another_setting(tmp_path: Path) -> None:
    run = start(config_of(tmp_path / "run", path=str(tmp_path / "all")))

    with pytest.raises(ConfigError, match=r"checkpointing\.path is '.*/all/run' there and '.*/new/run' here"):
        check_same(
            run.directory, resolved_yaml(config_of(tmp_path / "run", path=str(tmp_path / "new"))), algorithm_name="PPO"
        )
    check_same(
        run.directory, resolved_yaml(config_of(tmp_path / "run", path=str(tmp_path / "all"))), algorithm_name="PPO"
    )


@pytest.mark.parametrize("path", ["nosuch://x/y", "file"])
def test_a_place_that_cannot_be_written_is_found_before_the_run(path: str, working_dir: Path) -> None:
    (working_dir / "file").write_text("")

    with pytest.raises(ConfigError) as caught:
        start(config_of(working_dir / "run", path=path, interval=5))

    assert caught.value.field == "checkpointing.path"
    assert not (working_dir / "run").exists()
    start(config_of(working_dir / "run", path=path))  # Nothing will be written there.


# --- one driver a run ---


@pytest.mark.parametrize("resume", ["same", "any"])
def test_a_second_driver_is_kept_out(resume: str, tmp_path: Path) -> None:
    first = open_run(config_of(tmp_path / "run"))

    with pytest.raises(ConfigError, match="is writing this run: stop it first"):
        open_run(config_of(tmp_path / "run", resume=resume))

    first.lock.release()
    start(config_of(tmp_path / "run", resume=resume))


def test_a_start_that_fails_lets_the_next_one_in(tmp_path: Path) -> None:
    a_run(tmp_path / "run", iterations=3, checkpoints=(2,))
    with pytest.raises(ConfigError, match="other settings"):
        open_run(config_of(tmp_path / "run", resume="same").training(lr=3e-6))

    RunLock.take(tmp_path / "run").release()


def test_a_trial_continues_in_its_folder(tmp_path: Path) -> None:
    config = config_of(tmp_path / "PPO_1", path=str(tmp_path / "all" / "PPO_1"))
    first = open_trial_run(config)
    first.lock.release()
    assert (first.has_history, first.store.folder.local) == (False, tmp_path / "all" / "PPO_1")
    report(first.directory, 3)

    again = open_trial_run(config.copy().training(lr=0.5))
    again.lock.release()

    assert again.has_history
    assert again.store == first.store
    again.adopt_run(2)
    assert again.directory.last_iteration() == 2
    assert PPOConfig.from_yaml(again.directory.config).settings.training.lr == 0.5


@pytest.mark.parametrize("recorded", ["Mine", "old_place:MineConfig", "/elsewhere/mine.py:MineConfig"])
def test_an_algorithm_of_the_users_is_the_same_wherever_its_class_is(recorded: str, tmp_path: Path) -> None:
    run = open_run(config_of(tmp_path / "run"))
    run.directory.write_config(run.resolved.replace("algorithm: PPO", f"algorithm: {recorded}"))
    here = run.resolved.replace("algorithm: PPO", "algorithm: new_place:MineConfig")
    check_same(run.directory, here, algorithm_name="Mine")
    with pytest.raises(ConfigError, match="algorithm is"):
        check_same(run.directory, here.replace("MineConfig", "OtherConfig"), algorithm_name="Other")
