from __future__ import annotations

import random
from typing import Any

import pytest

from rlhf_ray import ConfigError, PPOConfig
from rlhf_ray.config.yaml_text import parsed_override, parsed_sections, yaml_text

AMBIGUOUS = ["010", "-010", "08", "007", "0_1", "1_000", "0x10", "0b1", "0o10", "1:30", "1:30.5", "1_0.5", "00.5"]


def error_of(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        PPOConfig.from_yaml(text)
    return caught.value


@pytest.mark.parametrize("number", AMBIGUOUS)
@pytest.mark.parametrize("setting", ["debugging.seed", "training.lr", "data.path"])
def test_an_ambiguous_number_is_refused_in_files_and_overrides_alike(number: str, setting: str) -> None:
    section, name = setting.split(".")
    errors = [error_of(f"{section}:\n  {name}: {number}\n"), error_of(f"{setting}: {number}\n")]
    with pytest.raises(ConfigError) as caught:
        PPOConfig().apply_overrides([f"{setting}={number}"])
    for error in (*errors, caught.value):
        assert (error.field, error.value) == (setting, number)
        assert "plain decimal digits" in error.remedy


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("rewards: {functions: [{name: 'r.py:f', code: 007}]}\n", "rewards.functions[0].code"),
        ("rollouts: {stop_token_ids: [1, 0x2]}\n", "rollouts.stop_token_ids[1]"),
        ("rollouts: {engine_args: {010: 1}}\n", "rollouts.engine_args"),
        ("rollouts: {engine_args: &a {x: *a, y: 1_0}}\n", "rollouts.engine_args.y"),
    ],
)
def test_it_is_found_wherever_it_is(text: str, field: str) -> None:
    assert error_of(text).field == field


@pytest.mark.parametrize(
    ("setting", "text", "value"),
    [
        ("debugging.seed", "10", 10),
        ("debugging.seed", "0", 0),
        ("rewards.bias", "-1", -1.0),
        ("rewards.bias", ".5", 0.5),
        ("rewards.bias", "1.", 1.0),
        ("rewards.bias", "1e3", 1000.0),
        ("rewards.bias", "+1.5E-3", 0.0015),
        ("reporting.run_dir", "'010'", "010"),
        ("reporting.run_dir", "no", "no"),
        ("reporting.progress", "off", "off"),
        ("data.subset", "on", "on"),
        ("data.shuffle", "false", False),
    ],
)
def test_a_plain_value_is_what_it_says(setting: str, text: str, value: Any) -> None:
    section, name = setting.split(".")
    config = PPOConfig().apply_overrides([f"{setting}={text}"])
    assert getattr(getattr(config.validate().settings, section), name) == value


@pytest.mark.parametrize(
    ("setting", "text", "remedy"),
    [
        ("debugging.seed", "1e3", "an integer"),
        ("debugging.seed", "1.", "an integer"),
        ("data.shuffle", "yes", "true or false"),
        ("data.shuffle", "off", "true or false"),
        ("rewards.bias", ".nan", "finite"),
        ("rewards.bias", "NaN", "a number"),
        ("rewards.bias", "inf", "a number"),
        ("training.lr", "-.inf", "greater than 0"),
    ],
)
def test_what_is_no_number_or_no_boolean_is_refused(setting: str, text: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy) as caught:
        PPOConfig().apply_overrides([f"{setting}={text}"]).validate()
    assert caught.value.field == setting


def texts(count: int, alphabet: str, longest: int) -> list[str]:
    """Random texts, the same in every run."""
    rng = random.Random(0)
    return ["".join(rng.choices(alphabet, k=rng.randint(1, longest))) for _ in range(count)]


WRITTEN = [
    0,
    -7,
    10**20,
    0.5,
    1e-6,
    -1e300,
    float("inf"),
    True,
    False,
    None,
    "yes",
    "off",
    "null",
    "~",
    "1e-6",
    "",
    "#",
]


def test_what_is_written_is_read_back() -> None:
    for value in (*WRITTEN, *AMBIGUOUS, *texts(500, "0123456789abeEox_:.-+ nyf#'\n", 8)):
        (section,) = parsed_sections(yaml_text({"section": {"name": value}})).values()
        assert section == {"name": value}
        assert type(section["name"]) is type(value)


def test_digits_are_read_as_decimal_or_not_as_a_number() -> None:
    refused = 0
    for text in texts(2000, "0123456789_xob:", 6):
        try:
            _, value = parsed_override(f"section.name={text}")
        except ConfigError:
            refused += 1
            continue
        if isinstance(value, (int, float)):
            assert (text, value) == (str(value), int(text))
    assert refused > 200
