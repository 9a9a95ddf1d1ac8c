from __future__ import annotations

import pytest

from rlhf_ray import AlgorithmConfig, ConfigError, PPOConfig


@pytest.mark.parametrize("text", ["algorithm: PPO\ntraining: {lr: 1.0e-5}\n", "training: {lr: 1.0e-5}\n"])
@pytest.mark.parametrize("reader", [AlgorithmConfig, PPOConfig])
def test_yaml_of_ppo_gives_a_ppo_config(reader: type[AlgorithmConfig], text: str) -> None:
    config = reader.from_yaml(text)

    assert type(config) is PPOConfig
    assert config.settings.training.lr == 1e-5


def test_to_dict_names_the_algorithm() -> None:
    assert PPOConfig().to_dict()["algorithm"] == "PPO"
    assert AlgorithmConfig.from_dict(PPOConfig().to_dict()) == PPOConfig()


def test_unknown_algorithm_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match="PPO") as caught:
        AlgorithmConfig.from_yaml("algorithm: ppo2\n")

    assert (caught.value.field, caught.value.value) == ("algorithm", "ppo2")


def test_defaults_are_valid_and_are_the_quickstart() -> None:
    settings = PPOConfig().validate().settings

    assert settings.model.path is None
    assert settings.data.path is None


def test_a_setting_that_does_not_exist_cannot_be_assigned() -> None:
    with pytest.raises(AttributeError):
        PPOConfig().lr = 1e-5  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        PPOConfig().training = {"lr": 1e-5}  # type: ignore[assignment,method-assign]


def test_docstring_cites_the_papers() -> None:
    assert all(paper in (PPOConfig.__doc__ or "") for paper in ("1707.06347", "1909.08593", "2203.02155"))
