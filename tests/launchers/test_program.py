from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.errors import ConfigError
from rlhf_ray.launchers.program import Program


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a configuration and a script in it."""
    folder = tmp_path / "it's here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "conf.yaml").write_text("training:\n  iterations: 3\n")
    (folder / "train.py").write_text("")
    return folder


def program(conf: str | None, *overrides: str, config: str | None = None, **more: Any) -> Program:
    usual = {"env": [], "working_dir": ".", "no_check": False}
    return Program.of(argparse.Namespace(conf=conf, config=config, overrides=list(overrides), **(usual | more)))


def test_a_configuration_becomes_the_train_command(folder: Path) -> None:
    command = program("conf.yaml", "training.lr=1e-5").command("python")

    assert command == ["python", "-m", "rlhf_ray.cli", "train", "./conf.yaml", "training.lr=1e-5"]


def test_a_script_gets_its_configuration_and_the_overrides(folder: Path) -> None:
    command = program("train.py", "training.lr=1", "data.prompt_template=x {prompt}", config="conf.yaml").command(
        "python"
    )

    assert command == [
        "python",
        "./train.py",
        "--config",
        "./conf.yaml",
        "training.lr=1",
        "data.prompt_template=x {prompt}",
    ]


def test_files_elsewhere_keep_their_whole_name(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    launched = program("conf.yaml", working_dir=str(elsewhere))

    assert launched.command("python")[-1] == str(folder / "conf.yaml")
    with pytest.raises(ConfigError, match=r"SCRIPT_OR_CONF = .*conf\.yaml.*all that is uploaded; set --working-dir"):
        launched.command("python", only_inside=True)


@pytest.mark.parametrize(
    ("conf", "config", "told"),
    [
        (None, None, "name a script"),
        ("missing.yaml", None, "no such file"),
        ("conf.json", None, r"must end in \.py or \.yaml or \.yml"),
        ("conf.yaml", "conf.yaml", "conf.yaml is a configuration itself"),
        ("train.py", "missing.yaml", "--config = 'missing.yaml': no such file"),
        ("train.py", "train.py", "--config = 'train.py': the name must end"),
    ],
)
def test_what_cannot_be_launched_is_named(folder: Path, conf: str | None, config: str | None, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        program(conf, config=config)


def test_settings_are_read_with_overrides_where_the_run_will_read_them(folder: Path) -> None:
    (folder / "my_rewards.py").write_text(
        "def short(*, completions, **columns):\n    return [0.0] * len(completions)\n"
    )
    (folder / "conf.yaml").write_text("rewards:\n  functions: ['my_rewards:short']\n")
    path = list(sys.path)

    config = program("conf.yaml", "training.gamma=0.5", working_dir=str(folder)).config

    assert config.settings.training.gamma == 0.5
    assert sys.path == path
    assert Path.cwd() == folder


def test_a_wrong_setting_is_found_before_the_launch(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.gamma"):
        program("conf.yaml", "training.gamma=2")
    with pytest.raises(ConfigError, match=r"training\.gamma"):
        program("train.py", "training.gamma=2", config="conf.yaml")
    program("conf.yaml", "training.gamma=2", no_check=True)


def test_a_script_with_settings_of_its_own_has_the_names_of_overrides_checked(folder: Path) -> None:
    script = program("train.py", "training.gamma=2")

    assert not script.shows_settings
    with pytest.raises(ConfigError, match=r"training\.gama"):
        program("train.py", "training.gama=2")


def test_the_environment_is_read(folder: Path) -> None:
    assert program("conf.yaml", env=["A=1", "_B2=x=y z", "C="]).variables == {"A": "1", "_B2": "x=y z", "C": ""}


@pytest.mark.parametrize("wrong", ["A", "2A=1", "=1", "A B=1"])
def test_a_wrong_assignment_is_named(folder: Path, wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"--env = .*write NAME=VALUE"):
        program("conf.yaml", env=[wrong])
