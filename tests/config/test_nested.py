from __future__ import annotations

from rlhf_ray.config.nested import flatten, nested
from rlhf_ray.config.settings import Settings

NESTED = {"algorithm": "PPO", "training": {"lr": 1e-5, "loss_args": {"a": {"b": 1}}}, "data": {}}


def test_sections_become_dotted_names_and_their_mappings_stay() -> None:
    assert flatten(NESTED) == {"algorithm": "PPO", "training.lr": 1e-5, "training.loss_args": {"a": {"b": 1}}}


def test_all_levels_with_another_separator() -> None:
    assert flatten(NESTED, separator="/", levels=None) == {
        "algorithm": "PPO",
        "training/lr": 1e-5,
        "training/loss_args/a/b": 1,
    }


def test_settings_are_flat_by_section_and_back() -> None:
    flat = dict(Settings())
    assert flat["training.lr"] == Settings()["training.lr"] == 1e-6
    assert flatten(nested(flat)) == flat
    assert Settings.of(flat) == Settings()
    assert Settings.of({"rollouts.engine_args": {"seed": 3}})["rollouts.engine_args.seed"] == 3
