from __future__ import annotations

import copy
import inspect
import json
import pickle
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, NoneType
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml

from rlhf_ray import AlgorithmConfig, ConfigError, GRPOConfig, PPOConfig
from rlhf_ray.config.names import OTHER_NAMES
from rlhf_ray.config.settings import Settings, section_types, setting_types


def module_reward(*, completions: list[str], **columns: Any) -> list[float]:
    return [1.0 for _ in completions]


def make_closure() -> Callable[..., list[float]]:
    scale = 2.0

    def scaled(*, completions: list[str], **columns: Any) -> list[float]:
        return [scale for _ in completions]

    return scaled


def error_of(call: Callable[[], object]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        call()
    return caught.value


# --- every setting, by every way in ---------------------------------------------------------------------------------

FIELDS = [f"{section}.{name}" for section in section_types() for name in setting_types(section)]


def default_of(field: str) -> Any:
    section, name = field.split(".")
    return getattr(getattr(PPOConfig().settings, section), name)


def another_value(annotation: Any, default: Any) -> tuple[Any, Any]:
    """Return a value of the annotated type that is not the default: as Python has it, and as YAML has it."""
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is Any or annotation is str:
        return f"{default}-2", f"{default}-2"
    if bool in args and NoneType not in args:
        return True, True
    if origin is Literal:
        choice = next(item for item in args if item != default)
        return choice, choice
    if origin is list:
        value, text = another_value(args[0], None)
        return [value], [text]
    if origin is tuple:
        return tuple(item / 2 for item in default), [item / 2 for item in default]
    if origin is dict and args[1] is not Any:
        value, text = another_value(args[1], None)
        return {"column": value}, {"column": text}
    if origin is dict:
        return {"max_num_seqs": 4}, {"max_num_seqs": 4}
    if origin is not None and NoneType not in args and str in args:
        return "gsm8k", "gsm8k"
    if NoneType in args:
        return another_value(next(item for item in args if item is not NoneType), default)
    if annotation is bool:
        return not default, not default
    if annotation in (int, float):
        return annotation((default or 0) + 3), annotation((default or 0) + 3)
    return json.dumps, "json:dumps"


@pytest.mark.parametrize("field", FIELDS)
def test_every_setting_is_set_alike_by_call_dict_yaml_and_override(field: str) -> None:
    section, name = field.split(".")
    value, text = another_value(setting_types(section)[name], default_of(field))
    assert value != default_of(field)

    called = getattr(PPOConfig(), section)(**{name: value})
    ways = [
        PPOConfig.from_dict({section: {name: value}}),
        PPOConfig.from_dict({field: value}),
        PPOConfig.from_yaml(yaml.safe_dump({section: {name: text}})),
        PPOConfig.from_yaml(yaml.safe_dump({field: text})),
        PPOConfig().apply_overrides([f"{field}={yaml.safe_dump(text, default_flow_style=True).split(chr(10))[0]}"]),
    ]

    assert getattr(getattr(called.settings, section), name) == value
    assert called != PPOConfig()
    assert all(config == called for config in ways)


@pytest.mark.parametrize("field", FIELDS)
def test_every_setting_survives_to_yaml_and_to_dict(field: str, tmp_path: Path) -> None:
    section, name = field.split(".")
    value, _ = another_value(setting_types(section)[name], default_of(field))
    config = PPOConfig.from_dict({field: value})

    text = config.to_yaml(tmp_path / "config.yaml")

    assert AlgorithmConfig.from_yaml(text) == config
    assert AlgorithmConfig.from_yaml(tmp_path / "config.yaml") == config
    assert AlgorithmConfig.from_dict(config.to_dict()) == config


def test_to_yaml_writes_every_setting_in_order_and_plain_loaders_read_the_same() -> None:
    config = PPOConfig().training(lr=1e-6, adam_betas=(0.9, 0.95)).data(path="1e5", prompt_template="Q: {prompt}\nA:")

    loaded = yaml.safe_load(config.to_yaml())

    assert [f"{section}.{name}" for section, values in loaded.items() if section != "algorithm" for name in values] == (
        FIELDS
    )
    assert loaded == config.to_dict(plain=True)
    assert loaded["training"]["lr"] == 1e-6
    assert loaded["data"]["path"] == "1e5"
    assert AlgorithmConfig.from_yaml(config.to_yaml()) == config


# --- defaults and the quickstart's preset -----------------------------------------------------------------------------

PRESET = {
    "data.batch_size": 64,
    "rollouts.group_size": 4,
    "rollouts.max_new_tokens": 8,
    "rollouts.timeout_s": 600.0,
    "training.lr": 2e-4,
    "training.critic_lr": 3e-4,
    "training.lr_schedule": "linear",
    "training.lambda_": 0.95,
    "learners.max_tokens_per_microbatch": 4096,
    "learners.gradient_checkpointing": False,
}


def value_of(config: AlgorithmConfig, field: str) -> Any:
    section, name = field.split(".")
    return getattr(getattr(config.settings, section), name)


def test_a_run_that_names_nothing_has_the_preset_and_else_the_defaults() -> None:
    config = PPOConfig()
    assert config.quickstart_values == PRESET
    for field in FIELDS:
        section, name = field.split(".")
        assert value_of(config, field) == PRESET.get(field, getattr(getattr(Settings(), section), name)), field


@pytest.mark.parametrize("named", [{"model.path": "owner/model"}, {"data.path": "train.jsonl"}])
def test_a_model_or_data_ends_the_whole_preset(named: dict[str, Any]) -> None:
    config = PPOConfig.from_dict(named)
    assert config.quickstart_values == {}
    assert config.settings.training == Settings().training
    assert config.settings.rollouts == Settings().rollouts
    assert config.settings.learners == Settings().learners
    assert config.settings.data.batch_size == Settings().data.batch_size
    training, rollouts = config.settings.training, config.settings.rollouts
    assert (training.lr, training.critic_lr, training.lambda_, training.lr_schedule) == (1e-6, 1e-5, 1.0, "constant")
    assert rollouts.max_new_tokens >= 1024


def test_what_is_given_wins_whenever_it_is_given() -> None:
    before = PPOConfig().training(lr=2e-4).rollouts(max_new_tokens=8).model(path="owner/model")
    after = PPOConfig().model(path="owner/model").rollouts(max_new_tokens=8).training(lr=2e-4)
    assert before == after
    assert (before.settings.training.lr, before.settings.training.critic_lr) == (2e-4, 1e-5)
    assert PPOConfig().training(lr=1e-6).settings.training.lr == 1e-6
    assert "training.lr" not in PPOConfig().training(lr=2e-4).quickstart_values
    assert before.model(path=None).settings.training.critic_lr == 3e-4


def test_defaults_of_an_algorithm_win_over_the_preset_and_may_end_it() -> None:
    class LongConfig(PPOConfig):
        defaults = {"rollouts": {"max_new_tokens": 16}}  # noqa: RUF012

    class ModelConfig(LongConfig):
        defaults = {"model": {"path": "owner/model"}}  # noqa: RUF012

    assert LongConfig().settings.rollouts.max_new_tokens == 16
    assert LongConfig().settings.training.lr == 2e-4
    assert LongConfig().quickstart_values.keys() == PRESET.keys() - {"rollouts.max_new_tokens"}
    assert ModelConfig().settings.training.lr == 1e-6
    assert ModelConfig().model(path=None).settings.training.lr == 2e-4


@pytest.mark.parametrize("config", [PPOConfig(), PPOConfig().model(path="owner/model").training(lr=2e-4)])
def test_what_is_written_reruns_the_run_whatever_the_defaults_become(
    config: PPOConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, values = config.to_yaml(), config.to_dict()
    expected = config.settings
    monkeypatch.setattr(
        "rlhf_ray.config.builder.quickstart_preset", lambda: {"training.lr": 7.0, "training.lambda_": 0.5}
    )
    assert PPOConfig().settings.training.lr == 7.0
    assert PPOConfig.from_yaml(text).settings == PPOConfig.from_dict(values).settings == expected


def test_a_sweep_over_models_has_the_defaults_of_language_models() -> None:
    from ray import tune

    config = PPOConfig().model(path=tune.grid_search([None, "owner/model"]))
    assert config.settings.training.lr == 1e-6
    assert PPOConfig.from_dict({"training.gamma": tune.uniform(0.9, 1.0)}).settings.training.lr == 2e-4


def test_help_names_both_defaults() -> None:
    assert "lr: policy learning rate. Default: 1e-06, quickstart 0.0002." in (PPOConfig.training.__doc__ or "")


# --- fluent calls ---------------------------------------------------------------------------------------------------


def test_calls_chain_on_one_config_and_touch_only_what_they_name() -> None:
    config = PPOConfig()

    same = config.training(lr=1e-5).training(gamma=0.9).rollouts(group_size=8)

    assert same is config
    assert config.settings.training.lr == 1e-5
    assert config.settings.training.gamma == 0.9
    assert config.settings.training.critic_lr == PPOConfig().settings.training.critic_lr


def test_rewards_takes_functions_by_position() -> None:
    closure = make_closure()

    config = PPOConfig().rewards(module_reward, closure, "gsm8k", {"name": "format"}, weights=[1, 1, 2, 0.5])

    assert config.settings.rewards.functions == [module_reward, closure, "gsm8k", {"name": "format"}]
    assert config.settings.rewards.weights == [1.0, 1.0, 2.0, 0.5]
    assert config.rewards(timeout_s=5.0).settings.rewards.functions[0] is module_reward


def test_rewards_given_twice() -> None:
    error = error_of(lambda: PPOConfig().rewards(module_reward, functions=["gsm8k"]))

    assert (error.field, error.value) == ("rewards.functions", ["gsm8k"])
    assert "given twice" in error.remedy


def test_a_failed_call_changes_nothing() -> None:
    config = PPOConfig()

    error_of(lambda: config.training(gamma=0.5, lr="fast"))
    error_of(lambda: config.apply_overrides(["training.gamma=0.5", "training.lr=fast"]))

    assert config == PPOConfig()


@pytest.mark.parametrize("section", section_types())
def test_help_lists_the_settings_of_each_section(section: str) -> None:
    method = getattr(PPOConfig, section)

    parameters = inspect.signature(method).parameters
    assert {*setting_types(section)} | {"self"} == set(parameters)
    for name in setting_types(section):
        assert f"    {name}: " in method.__doc__
        if parameters[name].kind is inspect.Parameter.KEYWORD_ONLY:
            assert parameters[name].default == getattr(getattr(Settings(), section), name)


# --- unknown names --------------------------------------------------------------------------------------------------

UNKNOWN: list[tuple[str, str, str]] = [
    ("training", "learning_rate", "did you mean training.lr?"),
    ("training", "actor_lr", "did you mean training.lr?"),
    ("training", "kl_coeff", "did you mean training.kl_coef?"),
    ("training", "clip_param", "did you mean training.clip_low and training.clip_high?"),
    ("training", "gae_lambda", "did you mean training.lambda_?"),
    ("training", "lambda", "did you mean training.lambda_?"),
    ("training", "num_epoch", "did you mean training.num_epochs?"),
    (
        "training",
        "train_batch_size",
        "did you mean data.batch_size (prompts per iteration; each has rollouts.group_size completions)?",
    ),
    ("training", "minibatch_size", "did you mean training.num_minibatches (their number in a pass, not their size)?"),
    ("rewards", "normalise", "did you mean rewards.normalize?"),
    ("rewards", "normalise_std", "did you mean rewards.normalize_std?"),
    ("rollouts", "group_sise", "did you mean rollouts.group_size?"),
    # Nothing but the letters in common.
    ("reporting", "path", "did you mean model.path or data.path or checkpointing.path?"),
    ("resources", "num_gpus", "did you mean learners.num_learners or rollouts.num_replicas (GPUs follow from them)?"),
    ("training", "batch_size", "did you mean data.batch_size?"),
    ("training", "num_generations", "did you mean rollouts.group_size?"),
    ("rollouts", "max_tokens", "did you mean rollouts.max_new_tokens?"),
    ("rollouts", "temprature", "did you mean rollouts.temperature?"),
    ("rollouts", "interval", "did you mean evaluation.interval or checkpointing.interval?"),
    ("learners", "lr", "did you mean training.lr?"),
    ("fault_tolerance", "zzz", "fault_tolerance has max_group_retries, max_learner_restarts, state_interval"),
]


@pytest.mark.parametrize("section, name, remedy", UNKNOWN)
def test_an_unknown_setting_names_the_nearest_by_every_way_in(section: str, name: str, remedy: str) -> None:
    field = f"{section}.{name}"
    ways: list[Callable[[], object]] = [
        lambda: getattr(PPOConfig(), section)(**{name: 4}),
        lambda: PPOConfig.from_dict({section: {name: 4}}),
        lambda: PPOConfig.from_dict({field: 4}),
        lambda: PPOConfig.from_yaml(f"{section}: {{{name}: 4}}"),
        lambda: PPOConfig().apply_overrides([f"{field}=4"]),
    ]

    for way in ways:
        error = error_of(way)
        assert (error.field, error.value, error.remedy) == (field, 4, f"no such setting; {remedy}")


@pytest.mark.parametrize(
    "key, remedy",
    [
        ("trainning", "did you mean training?"),
        ("rollout", "did you mean rollouts?"),
        ("learner.lr", "did you mean training.lr?"),
        ("rollout.temperature", "did you mean rollouts.temperature?"),
        ("algorithm.gamma", "did you mean training.gamma?"),
        ("actor_rollout_ref.actor.optim.lr", "did you mean training.lr?"),
        ("critic.optim", "did you mean training.critic_lr and model.critic_path?"),
        ("env_runners.num_envs", "did you mean rollouts (vLLM replicas sample completions)?"),
        ("env", "did you mean environment (and data for its rows)?"),
        ("lr", "did you mean training.lr?"),
        ("learning_rate", "did you mean training.lr?"),
        ("xyzzy", "there are model, data, rollouts"),
        ("xyzzy.path", "did you mean model.path or data.path or checkpointing.path?"),
        ("xyzzy.xyzzy", "there are model, data, rollouts"),
    ],
)
def test_an_unknown_section_names_the_nearest(key: str, remedy: str) -> None:
    error = error_of(lambda: PPOConfig.from_dict({key: 4}))

    assert (error.field, error.value) == (key, 4)
    assert error.remedy.startswith("no such section; ")
    assert remedy in error.remedy


def test_names_of_colocation_elsewhere_lead_to_ours() -> None:
    for other in ("vllm_mode", "colocate_all", "hybrid_engine", "share_gpus"):
        assert "resources.colocate" in OTHER_NAMES[other]


def test_other_names_lead_to_settings_and_hide_none() -> None:
    ours = {name for section in section_types() for name in setting_types(section)}
    for other, text in OTHER_NAMES.items():
        assert other not in ours | section_types().keys()
        fields = re.findall(r"\w+\.\w+", text)
        assert set(fields) <= set(FIELDS), other
        assert fields or re.match(r"\w+", text)[0] in {*section_types(), "nothing"}, other  # type: ignore[index]


FOREIGN = {
    "RLlib": {
        "lr": "training.lr",
        "vf_loss_coeff": "training.critic_lr",
        "vf_clip_param": "training.value_clip",
        "clip_param": "training.clip_low",
        "num_sgd_iter": "training.num_epochs",
        "minibatch_size": "training.num_minibatches",
        "train_batch_size": "data.batch_size",
        "entropy_coeff": "training.entropy_coef",
        "kl_coeff": "training.kl_coef",
        "kl_target": "training.kl_target",
        "lambda_": "training.lambda_",
        "grad_clip": "training.max_grad_norm",
        "num_env_runners": "rollouts.num_replicas",
        "num_gpus_per_learner": "learners.num_gpus_per_learner",
    },
    "TRL": {
        "learning_rate": "training.lr",
        "num_generations": "rollouts.group_size",
        "max_completion_length": "rollouts.max_new_tokens",
        "beta": "training.kl_coef",
        "epsilon": "training.clip_low",
        "num_iterations": "training.num_epochs",
        "per_device_train_batch_size": "data.batch_size",
        "gradient_accumulation_steps": "data.batch_size",
        "steps_per_generation": "training.num_minibatches",
        "max_steps": "training.iterations",
        "vf_coef": "training.critic_lr",
        "scale_rewards": "training.advantage",
    },
    "verl": {
        "train_batch_size": "data.batch_size",
        "ppo_mini_batch_size": "training.num_minibatches",
        "ppo_epochs": "training.num_epochs",
        "max_response_length": "rollouts.max_new_tokens",
        "clip_ratio": "training.clip_low",
        "kl_loss_coef": "training.kl_coef",
        "adv_estimator": "training.advantage",
        "lam": "training.lambda_",
        "total_epochs": "training.iterations",
        "test_freq": "evaluation.interval",
        "save_freq": "checkpointing.interval",
    },
}


@pytest.mark.parametrize(
    "name, ours", [pair for names in FOREIGN.values() for pair in names.items()], ids=lambda text: str(text)
)
@pytest.mark.parametrize("section", section_types())
def test_the_hint_for_another_librarys_name_is_the_same_in_every_section(section: str, name: str, ours: str) -> None:
    if name in setting_types(section):
        return
    error = error_of(lambda: PPOConfig.from_dict({f"{section}.{name}": 1}))
    assert error.remedy.startswith(f"no such setting; did you mean {ours}")


@pytest.mark.parametrize("section", section_types())
@pytest.mark.parametrize("name", ["vf_share_layers", "sequence_length", "attention_heads", "observation_filter"])
def test_what_only_looks_alike_is_not_suggested(section: str, name: str) -> None:
    error = error_of(lambda: PPOConfig.from_dict({f"{section}.{name}": 1}))
    assert error.remedy.startswith(f"no such setting; {section} has ")


@pytest.mark.parametrize(
    "name, hint",
    [
        ("lr", "read config.settings.training.lr, set config.training(lr=...)"),
        ("interval", "set config.evaluation(interval=...) or config.checkpointing(interval=...)"),
        ("num_sgd_iter", "did you mean training.num_epochs?"),
        ("env_runners", "did you mean rollouts (vLLM replicas sample completions)?"),
        ("envs", "did you mean environment (and data for its rows)?"),
        ("multi_agent", "there is nothing in its place: there is one policy"),
        ("framework", "there is nothing in its place: it is PyTorch"),
        ("trainning", "did you mean training?"),
        ("xyzzy", "its sections are model, data, rollouts"),
    ],
)
def test_an_attribute_that_a_config_does_not_have_is_answered_with_the_right_name(name: str, hint: str) -> None:
    with pytest.raises(AttributeError, match=rf"PPOConfig has no {name}; .*{re.escape(hint)}"):
        getattr(PPOConfig(), name)
    assert not hasattr(PPOConfig(), name)


def test_a_subclass_without_slots_takes_no_setting_as_an_attribute() -> None:
    class OpenConfig(PPOConfig):
        pass

    config: Any = OpenConfig()
    with pytest.raises(AttributeError, match=r"set config.training\(lr=...\)"):
        config.lr = 1e-5
    with pytest.raises(
        AttributeError, match=r"OpenConfig.training is a section; set its settings with config.training"
    ):
        config.training = {"lr": 1e-5}
    with pytest.raises(AttributeError, match=r"did you mean training.lr\?"):
        config.learning_rate = 1e-5
    config.note = "kept"
    assert config.copy().note == "kept"


def test_a_section_needs_names() -> None:
    assert error_of(lambda: PPOConfig.from_dict({"training": 3})).field == "training"


# --- dictionaries ---------------------------------------------------------------------------------------------------


def test_dotted_names_win_over_sections() -> None:
    config = PPOConfig.from_dict({"training.lr": 2e-5, "training": {"lr": 1e-5, "gamma": 0.5}})

    assert (config.settings.training.lr, config.settings.training.gamma) == (2e-5, 0.5)


def test_from_dict_is_python_so_text_is_not_a_number() -> None:
    assert error_of(lambda: PPOConfig.from_dict({"training": {"lr": "1e-6"}})).remedy == "must be a number"


def test_to_dict_keeps_functions_and_shares_no_container() -> None:
    closure = make_closure()
    config = PPOConfig().rewards(closure).rollouts(engine_args={"a": [1]})

    values = config.to_dict()
    values["rollouts"]["engine_args"]["a"].append(2)
    values["rewards"]["functions"].append("gsm8k")

    assert config.settings.rewards.functions == [closure]
    assert config.settings.rollouts.engine_args == {"a": [1]}


# --- YAML -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["1e-6", "1E-6", "1.0e-6", '"1e-6"', "0.000001"])
def test_yaml_numbers_with_an_exponent(text: str) -> None:
    config = PPOConfig.from_yaml(f"training:\n  lr: {text}\nrollouts:\n  engine_args: {{x: 1e-6}}\n")

    assert config.settings.training.lr == 1e-6
    assert config.settings.rollouts.engine_args == {"x": 1e-6}


def test_yaml_with_empty_sections_or_nothing_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing here\n")

    assert PPOConfig.from_yaml(tmp_path / "empty.yaml") == PPOConfig()
    assert PPOConfig.from_yaml("training:\n  # lr: 1e-6\n") == PPOConfig()


@pytest.mark.parametrize(
    "text, field, remedy",
    [
        ("training: {lr: [}\n", "config", "not valid YAML: line 1, column"),
        ("- training\n- data\n", "config", "write sections and their settings"),
        ("training:\n  lr: 1e-6\n  lr: 2e-6\n", "config", "line 3, column 3: lr is given twice"),
        ("training: {}\ndata: {}\ntraining: {lr: 1}\n", "config", "line 3, column 1: training is given twice"),
        ("data: {split: 2024-13-45}\n", "config", "not valid YAML"),
        ("model: {path: None}\n", "model.path", "or null"),
        ("data: {prompt_column: true}\n", "data.prompt_column", "in quotes"),
        ("algorithm: GRPOO\n", "algorithm", "no such algorithm"),
        ("algorithm: [PPO]\n", "algorithm", "no such algorithm"),
    ],
)
def test_wrong_yaml(text: str, field: str, remedy: str) -> None:
    error = error_of(lambda: AlgorithmConfig.from_yaml(text))

    assert error.field == field
    assert remedy in error.remedy


def test_a_missing_file_and_one_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")

    assert "No such file" in error_of(lambda: PPOConfig.from_yaml(tmp_path / "none.yaml")).remedy
    assert "No such file" in error_of(lambda: PPOConfig.from_yaml("none.yaml")).remedy
    assert "not UTF-8" in error_of(lambda: PPOConfig.from_yaml(tmp_path / "binary.yaml")).remedy


# --- overrides ------------------------------------------------------------------------------------------------------


def test_overrides_are_yaml() -> None:
    config = PPOConfig().apply_overrides(
        [
            "training.lr=2e-6",
            "training.max_grad_norm=null",
            "training.adam_betas=[0.9, 0.95]",
            "data.shuffle=false",
            "data.prompt_template='Q: {prompt} = '",
            "rewards.functions=[gsm8k, {name: format, weight: 1e-1}]",
            "rollouts.engine_args={max_num_seqs: 32}",
        ]
    )

    settings = config.settings
    assert settings.training.lr == 2e-6
    assert settings.training.max_grad_norm is None
    assert settings.training.adam_betas == (0.9, 0.95)
    assert settings.data.shuffle is False
    assert settings.data.prompt_template == "Q: {prompt} = "
    assert settings.rewards.functions == ["gsm8k", {"name": "format", "weight": 0.1}]
    assert settings.rollouts.engine_args == {"max_num_seqs": 32}


@pytest.mark.parametrize("override", ["training.lr", "training.lr=", "=3", "lr=3", "training.lr.x=3", "training lr=3"])
def test_malformed_overrides(override: str) -> None:
    error = error_of(lambda: PPOConfig().apply_overrides([override]))

    assert error.value == override
    assert "write section.name=value" in error.remedy


def test_an_override_that_is_not_yaml() -> None:
    error = error_of(lambda: PPOConfig().apply_overrides(["rewards.functions=[gsm8k"]))

    assert (error.field, error.value) == ("rewards.functions", "[gsm8k")
    assert "not valid YAML" in error.remedy


@pytest.mark.parametrize(
    ("override", "comment", "written"),
    [
        (
            "data.prompt_template=Solve {prompt} End with #### and the number",
            "'#### and the number'",
            """'data.prompt_template="Solve {prompt} End with #### and the number"'""",
        ),
        ("data.prompt_template=#{prompt}", "'#{prompt}'", """'data.prompt_template="#{prompt}"'"""),
        ("data.prompt_template='{prompt}' # why", "'# why'", None),
        ("rollouts.stop=[a, b #]", "'#]'", None),
    ],
)
def test_an_override_is_never_cut_at_a_comment(override: str, comment: str, written: str | None) -> None:
    error = error_of(lambda: PPOConfig().apply_overrides([override]))

    assert error.field == override.partition("=")[0]
    assert f"YAML takes {comment} for a comment" in error.remedy
    assert "quotes" in error.remedy
    if written is not None:
        assert error.remedy.endswith(written)
        (word,) = shlex.split(written)
        assert PPOConfig().apply_overrides([word]).settings.data.prompt_template == override.partition("=")[2]


@pytest.mark.parametrize(
    ("written", "template"),
    [
        ("Q#{prompt}", "Q#{prompt}"),
        ("'{prompt} #### it''s'", "{prompt} #### it's"),
        ('"{prompt} # \\"x\\""', '{prompt} # "x"'),
        ("|-\n  {prompt}\n  # a heading", "{prompt}\n# a heading"),
    ],
)
def test_a_hash_that_begins_no_comment_is_text(written: str, template: str) -> None:
    settings = PPOConfig().apply_overrides([f"data.prompt_template={written}"]).settings

    assert settings.data.prompt_template == template


def test_an_override_may_name_the_algorithm_that_the_config_is_of() -> None:
    config = GRPOConfig().apply_overrides(["algorithm=GRPO", "training.lr=1e-5"])
    assert config == GRPOConfig().training(lr=1e-5)
    error = error_of(lambda: GRPOConfig().apply_overrides(["algorithm=PPO"]))
    assert (error.field, error.value) == ("algorithm", "PPO")
    assert error.remedy == "this is a config of GRPO; start from PPOConfig()"


def test_an_algorithm_takes_the_place_of_the_files() -> None:
    text = "algorithm: PPO\ntraining: {lr: 1e-5, kl_coef: 0.0}\n"
    assert AlgorithmConfig.from_yaml(text, algorithm="GRPO") == GRPOConfig().training(lr=1e-5, kl_coef=0.0)
    changed = GRPOConfig().training(kl_coef=0.5)
    assert AlgorithmConfig.from_yaml(changed.to_yaml(), algorithm="GRPO") == changed


@pytest.mark.parametrize("pair", [("PPO", "GRPO"), ("GRPO", "PPO"), ("GRPO", "DAPO"), ("PPO", "ReMax")])
def test_a_file_that_holds_all_of_another_algorithm_is_not_renamed(pair: tuple[str, str]) -> None:
    text = AlgorithmConfig.from_dict({"algorithm": pair[0]}).to_yaml()
    error = error_of(lambda: AlgorithmConfig.from_yaml(text, algorithm=pair[1]))
    assert (error.field, error.value) == ("algorithm", pair[1])
    assert f"all else that makes up {pair[0]}; leave out its lines of " in error.remedy
    assert "training.advantage" in error.remedy


@pytest.mark.parametrize("name", ["grpo", "GRPPO", "7"])
def test_an_algorithm_that_does_not_exist_is_answered_with_those_there_are(name: str) -> None:
    error = error_of(lambda: AlgorithmConfig.from_yaml("{}\n", algorithm=name))
    assert (error.field, error.value) == ("algorithm", name)
    assert ("did you mean GRPO?" in error.remedy) == (name == "grpo")
    assert "there is CISPO, DAPO" in error.remedy


def test_the_last_override_of_a_setting_wins() -> None:
    assert PPOConfig().apply_overrides(["training.lr=1", "training.lr=2"]).settings.training.lr == 2.0


# --- functions in files ---------------------------------------------------------------------------------------------

SCRIPT = """
import sys
from rlhf_ray import PPOConfig

def reward(*, completions, **columns):
    return [1.0 for _ in completions]

def on_result(*, algorithm, result):
    result["seen"] = True

if __name__ == "__main__":
    config = PPOConfig().rewards(reward, lambda **_: [0.0], "gsm8k").callbacks(on_train_result=on_result)
    sys.stdout.write(config.to_yaml())
"""


def test_an_importable_function_is_written_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scores_of_a_user.py").write_text("class Scores:\n    @staticmethod\n    def exact(**columns): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    import scores_of_a_user  # type: ignore[import-not-found]

    config = PPOConfig().rewards(scores_of_a_user.Scores.exact).callbacks(on_checkpoint=scores_of_a_user.Scores.exact)
    restored = PPOConfig.from_yaml(config.to_yaml())

    assert restored.settings.rewards.functions == ["scores_of_a_user:Scores.exact"]
    assert restored.settings.callbacks.on_checkpoint is scores_of_a_user.Scores.exact


CALL_PICKLED = """
import pickle, sys
result = {}
pickle.load(sys.stdin.buffer)(algorithm=None, result=result)
sys.stdout.write(repr(result))
"""


def result_of_callback_elsewhere(callback: object) -> str:
    """Ship a callback to a fresh interpreter, as Ray does, and call it there."""
    pickled = pytest.importorskip("cloudpickle").dumps(callback)
    done = subprocess.run(
        [sys.executable, "-c", CALL_PICKLED], input=pickled, capture_output=True, check=True, timeout=60
    )
    return str(done.stdout, "utf-8")


def test_a_function_of_a_script_is_written_by_its_file(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)

    def run(*command: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
        )
        loaded: dict[str, Any] = yaml.safe_load(done.stdout)
        return loaded

    values = run("train.py")
    assert values["rewards"]["functions"] == [f"{script}:reward", "<not restorable: <lambda>>", "gsm8k"]
    assert values["callbacks"]["on_train_result"] == f"{script}:on_result"
    assert run("-m", "train")["rewards"]["functions"][0] == "train:reward"

    del values["rewards"]
    restored = PPOConfig.from_yaml(yaml.safe_dump(values))
    assert restored == PPOConfig.from_yaml(restored.to_yaml())
    assert result_of_callback_elsewhere(restored.settings.callbacks.on_train_result) == "{'seen': True}"


class Scorer:
    def __call__(self, **columns: Any) -> list[float]:
        return [0.0]


@pytest.mark.parametrize(
    "function, name",
    [
        (make_closure(), "make_closure.<locals>.scaled"),
        (lambda **columns: [0.0], "<lambda>"),
        (partial(module_reward, scale=2), "partial"),
        (Scorer(), "Scorer"),
    ],
)
def test_a_function_that_no_file_can_hold_is_refused_by_name(function: Callable[..., Any], name: str) -> None:
    rewards = PPOConfig().rewards(function).to_yaml()
    error = error_of(lambda: PPOConfig.from_yaml(rewards))
    assert (error.field, error.value) == ("rewards.functions", f"<not restorable: {name}>")
    assert f".rewards({name})" in error.remedy

    callbacks = PPOConfig().callbacks(on_evaluate_end=function).to_yaml()
    error = error_of(lambda: PPOConfig.from_yaml(callbacks))
    assert error.field == "callbacks.on_evaluate_end"
    assert ".callbacks(on_evaluate_end=...)" in error.remedy


def test_a_dataset_object_is_refused_by_name() -> None:
    class Dataset: ...

    error = error_of(lambda: PPOConfig.from_yaml(PPOConfig().data(path=Dataset()).to_yaml()))

    assert error.field == "data.path"
    assert "Dataset" in str(error.value)
    assert ".data(path=...)" in error.remedy


def test_a_marker_inside_a_mapping_is_found() -> None:
    text = PPOConfig().rewards({"name": "mine", "score": lambda: 0}).to_yaml()

    assert error_of(lambda: PPOConfig.from_yaml(text)).field == "rewards.functions"


@pytest.mark.parametrize(
    "reference, remedy",
    [
        ("dumps", "write 'module:function'"),
        ("no_such_module:f", "no module 'no_such_module' on the path"),
        ("json:dumpz", "json has no 'dumpz'; nearest: 'dump'"),
        ("missing.py:f", "there is no file"),
    ],
)
def test_a_callback_that_cannot_be_imported(reference: str, remedy: str) -> None:
    error = error_of(lambda: PPOConfig().apply_overrides([f"callbacks.on_train_result='{reference}'"]))

    assert (error.field, error.value) == ("callbacks.on_train_result", reference)
    assert remedy in error.remedy


# --- copies ---------------------------------------------------------------------------------------------------------


def test_frozen_configs_refuse_every_change_and_their_copies_do_not() -> None:
    config = PPOConfig().training(lr=1e-5).freeze()
    changes: list[Callable[[], object]] = [
        lambda: config.training(lr=1e-6),
        lambda: config.apply_overrides(["training.lr=1e-6"]),
        lambda: copy.deepcopy(config).training(lr=1e-6),
    ]

    for change in changes:
        error = error_of(change)
        assert (error.field, error.value) == ("training.lr", 1e-6)
        assert "copy()" in error.remedy
    assert config.copy().training(lr=1e-6).settings.training.lr == 1e-6
    assert config.settings.training.lr == 1e-5


@pytest.mark.parametrize("copier", [PPOConfig.copy, copy.deepcopy])
def test_copies_are_equal_and_share_no_container_but_share_functions(copier: Callable[[PPOConfig], PPOConfig]) -> None:
    scorer = Scorer()
    config = PPOConfig().rewards(scorer).rollouts(stop=["\n"], engine_args={"a": {"b": [1]}})

    twin = copier(config)
    assert twin == config
    twin.settings.rollouts.stop.append("x")
    twin.settings.rollouts.engine_args["a"]["b"].append(2)

    assert config.settings.rollouts.stop == ["\n"]
    assert config.settings.rollouts.engine_args == {"a": {"b": [1]}}
    assert twin.settings.rewards.functions[0] is scorer


def test_what_is_given_is_copied() -> None:
    stop = ["\n"]
    config = PPOConfig().rollouts(stop=stop)

    stop.append("x")

    assert config.settings.rollouts.stop == ["\n"]


def test_configs_pickle_with_their_functions() -> None:
    cloudpickle = pytest.importorskip("cloudpickle")
    config = PPOConfig().training(lr=1e-5).freeze()

    assert pickle.loads(pickle.dumps(config)) == config
    error_of(lambda: pickle.loads(pickle.dumps(config)).training(lr=1.0))
    restored = cloudpickle.loads(cloudpickle.dumps(PPOConfig().rewards(make_closure())))
    assert restored.settings.rewards.functions[0](completions=["a", "b"]) == [2.0, 2.0]


def test_equality_is_by_class_and_settings() -> None:
    class OtherConfig(PPOConfig): ...

    assert PPOConfig().training(lr=1e-5) == PPOConfig().training(lr=1e-5)
    assert PPOConfig().training(lr=1e-5) != PPOConfig()
    assert PPOConfig() != OtherConfig()
    assert PPOConfig() != "PPOConfig()"


def test_repr_shows_what_differs_from_the_defaults() -> None:
    config = PPOConfig().training(lr=1e-5, gamma=1.0).data(path="rows.jsonl").rewards("gsm8k", make_closure())

    assert repr(PPOConfig()) == "PPOConfig()"
    assert repr(config) == (
        "PPOConfig().data(path='rows.jsonl')"
        ".rewards(functions=['gsm8k', <make_closure.<locals>.scaled>]).training(lr=1e-05)"
    )
    assert eval(repr(PPOConfig().training(lr=1e-5))) == PPOConfig().training(lr=1e-5)


# --- building -------------------------------------------------------------------------------------------------------


class FakePPO:
    """What a Trainable is to the config: a class that takes one."""

    def __init__(self, *, config: AlgorithmConfig) -> None:
        self.config = config


@pytest.fixture
def trainables(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = ModuleType("rlhf_ray.tune.trainables")
    fake.trainable = {PPOConfig: FakePPO}.get  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, fake.__name__, fake)


@pytest.mark.usefixtures("trainables")
@pytest.mark.parametrize("build", [PPOConfig.build, PPOConfig.build_algo])
def test_build_gives_the_trainable_a_frozen_copy(build: Callable[[PPOConfig], Any]) -> None:
    config = PPOConfig().training(lr=1e-5)

    algo = build(config)
    config.training(lr=1e-6)

    assert isinstance(algo, FakePPO)
    assert algo.config.settings.training.lr == 1e-5
    error_of(lambda: algo.config.training(lr=1.0))


@pytest.mark.usefixtures("trainables")
@pytest.mark.parametrize("call", [PPOConfig.build, PPOConfig.build_algo, PPOConfig.validate, PPOConfig.schedule])
def test_wrong_settings_fail_before_anything_is_built(call: Callable[[PPOConfig], Any]) -> None:
    assert error_of(lambda: call(PPOConfig().training(lr=0.0))).field == "training.lr"


def test_validate_returns_the_config() -> None:
    config = PPOConfig()

    assert config.validate() is config


# --- other algorithms -----------------------------------------------------------------------------------------------


@pytest.fixture
def other_config(monkeypatch: pytest.MonkeyPatch) -> type[AlgorithmConfig]:
    monkeypatch.setattr("rlhf_ray.config.builder.ALGORITHMS", {"PPO": PPOConfig})

    class MyConfig(AlgorithmConfig):
        algorithm_name = "MyAlgorithm"

    return MyConfig


def test_a_subclass_is_registered_by_its_name(other_config: type[AlgorithmConfig]) -> None:
    config = AlgorithmConfig.from_yaml("algorithm: MyAlgorithm\n")

    assert type(config) is other_config
    assert config.to_dict()["algorithm"] == "MyAlgorithm"


def test_settings_of_another_algorithm_are_refused(other_config: type[AlgorithmConfig]) -> None:
    error = error_of(lambda: PPOConfig.from_yaml(other_config().to_yaml()))

    assert (error.field, error.value) == ("algorithm", "MyAlgorithm")
    assert "MyConfig" in error.remedy


def test_a_subclass_without_a_name_of_its_own_reads_its_parents_files() -> None:
    class MyPPOConfig(PPOConfig): ...

    assert type(MyPPOConfig.from_dict(PPOConfig().to_dict())) is MyPPOConfig
    assert type(AlgorithmConfig.from_yaml("algorithm: PPO\n")) is PPOConfig


def test_the_base_class_is_not_an_algorithm() -> None:
    with pytest.raises(TypeError, match="such as PPOConfig"):
        AlgorithmConfig()


# --- Ray Tune -------------------------------------------------------------------------------------------------------


def test_ray_tune_resolves_a_config_and_each_trial_reads_it_back() -> None:
    variants = pytest.importorskip("ray.tune.search.variant_generator")
    closure = make_closure()
    config = PPOConfig().rewards(closure).training(lr=variants.grid_search([1e-5, 1e-6]))
    space = {**config.to_dict(), "training.gamma": variants.grid_search([0.5, 1.0])}

    trials = [PPOConfig.from_dict(spec["config"]) for _, spec in variants.generate_variants({"config": space})]

    pairs = {(trial.settings.training.lr, trial.settings.training.gamma) for trial in trials}
    assert pairs == {(1e-5, 0.5), (1e-5, 1.0), (1e-6, 0.5), (1e-6, 1.0)}
    assert all(trial.validate().settings.rewards.functions == [closure] for trial in trials)
