"""What makes settings wrong, found before anything starts.

Each setting by itself is checked by ``values.py``. Here are the combinations that cannot work: a function per concern
yields the name of a setting and what to write instead. Nothing here imports an engine, and nothing is repaired.
"""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_ray.config.checks import data, environment, machine, training
from rlhf_ray.config.plugins import Plugin
from rlhf_ray.config.settings import Settings
from rlhf_ray.config.values import check_value
from rlhf_ray.errors import ConfigError

__all__ = ["check_advantage", "check_attention_device", "check_loss", "validate"]


def validate(settings: Settings) -> None:
    """Check every setting and every combination that can be known to fail without starting an engine.

    Raises:
        ConfigError: The first thing wrong.
    """
    for field, value in settings:
        check_value(field, value)
    for problems in (*data.COMBINATIONS, *environment.COMBINATIONS, *training.COMBINATIONS, *machine.COMBINATIONS):
        _raise_first(settings, problems(settings))


def check_loss(plugin: Plugin, settings: Settings) -> None:
    """Refuse settings that the loss would ignore.

    Raises:
        ConfigError: A dual clip is given to a loss that has none, or another policy than the trained one may sample and
            the loss cannot correct for it.
    """
    _raise_first(settings, training.loss_problems(plugin, settings))


def check_advantage(plugin: Plugin, settings: Settings) -> None:
    """Refuse settings that the advantage cannot work with.

    Raises:
        ConfigError: It compares completions and there is one per prompt; rewards become what it cannot take; or a
            setting of the critic is given to a run that has none.
    """
    _raise_first(settings, training.advantage_problems(plugin, settings))


def check_attention_device(kernel: str, *, on_gpu: bool, dtype: str) -> None:
    """Whether learners can compute an attention: again when it is known what ``auto`` means.

    Raises:
        ConfigError: They cannot.
    """
    for field, remedy in machine.attention_device_problems(kernel, on_gpu=on_gpu, dtype=dtype):
        raise ConfigError(field, kernel, remedy)


def _raise_first(settings: Settings, problems: Iterator[tuple[str, str]]) -> None:
    for field, remedy in problems:
        raise ConfigError(field, settings[field], remedy)
