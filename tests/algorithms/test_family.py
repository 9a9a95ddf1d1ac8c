from __future__ import annotations

import importlib
import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import rlhf_ray
from rlhf_ray import (
    AlgorithmConfig,
    CISPOConfig,
    ConfigError,
    DAPOConfig,
    DrGRPOConfig,
    GMPOConfig,
    GRPOConfig,
    GSPOConfig,
    MaxRLConfig,
    OPOConfig,
    PPOConfig,
    ReinforcePPBaselineConfig,
    ReinforcePPConfig,
    ReMaxConfig,
    RLOOConfig,
    SAPOConfig,
    register_advantage,
)
from rlhf_ray.algorithms import built_in
from rlhf_ray.config import plugins
from rlhf_ray.config.builder import ALGORITHMS
from rlhf_ray.config.plugins import advantage_plugin, loss_plugin
from rlhf_ray.config.settings import ModelSettings, Settings, section_types, setting_types

Config = type[AlgorithmConfig]

FAMILY: dict[str, Config] = {
    "CISPO": CISPOConfig,
    "DAPO": DAPOConfig,
    "DrGRPO": DrGRPOConfig,
    "GMPO": GMPOConfig,
    "GRPO": GRPOConfig,
    "GSPO": GSPOConfig,
    "MaxRL": MaxRLConfig,
    "OPO": OPOConfig,
    "PPO": PPOConfig,
    "RLOO": RLOOConfig,
    "ReMax": ReMaxConfig,
    "ReinforcePP": ReinforcePPConfig,
    "ReinforcePPBaseline": ReinforcePPBaselineConfig,
    "SAPO": SAPOConfig,
}
COMPARE_GROUPS = sorted(set(FAMILY) - {"PPO", "ReMax", "ReinforcePP"})

every_algorithm = pytest.mark.parametrize("name", list(FAMILY))


def differences(config: AlgorithmConfig) -> dict[str, Any]:
    """What differs from the defaults of settings.py where a model is named, by dotted name."""
    found, plain = {}, Settings(model=ModelSettings(path="owner/model"))
    settings = config.copy().model(path="owner/model").settings
    for section in section_types():
        ours, theirs = getattr(settings, section), getattr(plain, section)
        for name in setting_types(section):
            if getattr(ours, name) != getattr(theirs, name):
                found[f"{section}.{name}"] = getattr(ours, name)
    return found


def error_of(call: Callable[[], object]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        call()
    return caught.value


@pytest.fixture
def own_names() -> Iterator[None]:
    """What a test registers is forgotten."""
    tables: list[dict[str, Any]] = [ALGORITHMS, plugins.ADVANTAGES.plugins]
    before = [dict(table) for table in tables]
    yield
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)


# --- what each of them is -------------------------------------------------------------------------------------------


def test_the_family_is_complete() -> None:
    assert built_in() == FAMILY
    exported = set(rlhf_ray.__all__)
    assert {f"{name}Config" for name in FAMILY} == {n for n in exported if n.endswith("Config")} - {"AlgorithmConfig"}
    assert set(FAMILY) <= exported


@every_algorithm
def test_each_has_the_name_that_it_is_exported_by(name: str) -> None:
    assert getattr(rlhf_ray, f"{name}Config") is FAMILY[name]
    assert FAMILY[name].algorithm_name == name


@every_algorithm
def test_the_defaults_are_valid(name: str) -> None:
    FAMILY[name]().validate()


# Advantage, loss, whitened, aggregation, lower and upper clip, and the KL to the reference: weight, where, estimator.
NO_KL = (0.0, "reward", "k1")
SEQUENCE_MEAN, SEQUENCE_SUM = "seq_mean_token_mean", "seq_mean_token_sum"


@pytest.mark.parametrize(
    ("name", "advantage", "loss", "whitened", "aggregation", "clip", "kl"),
    [
        ("PPO", "gae", "ppo", True, "token_mean", (0.2, 0.2), NO_KL),
        ("GRPO", "grpo", "ppo", False, SEQUENCE_MEAN, (0.2, 0.2), (0.04, "loss", "k3")),
        ("DrGRPO", "dr_grpo", "ppo", False, "seq_mean_token_sum_norm", (0.2, 0.2), NO_KL),
        ("RLOO", "rloo", "ppo", False, SEQUENCE_SUM, (0.2, 0.2), (0.05, "reward", "k1")),
        ("ReinforcePP", "reinforce_plus_plus", "ppo", True, "token_mean", (0.2, 0.2), (1e-3, "reward", "k1")),
        ("ReinforcePPBaseline", "dr_grpo", "ppo", True, "token_mean", (0.2, 0.2), (1e-3, "loss", "k2")),
        ("DAPO", "grpo", "ppo", False, "token_mean", (0.2, 0.28), NO_KL),
        ("GSPO", "grpo", "gspo", False, SEQUENCE_MEAN, (3e-4, 4e-4), NO_KL),
        # A lower clip of 1 is a ratio of 0: no bound.
        ("CISPO", "grpo", "cispo", False, "token_mean", (1.0, 0.28), NO_KL),
        ("SAPO", "grpo", "sapo", False, SEQUENCE_MEAN, (0.2, 0.2), NO_KL),
        ("GMPO", "grpo", "gmpo", False, SEQUENCE_MEAN, (0.4, 0.4), NO_KL),
        ("OPO", "opo", "ppo", False, "token_mean", (0.2, 0.2), NO_KL),
        ("MaxRL", "maxrl", "ppo", False, "token_mean", (0.2, 0.2), NO_KL),
        ("ReMax", "remax", "ppo", False, SEQUENCE_SUM, (0.2, 0.2), NO_KL),
    ],
)
def test_published_numbers(
    name: str,
    advantage: str,
    loss: str,
    whitened: bool,
    aggregation: str,
    clip: tuple[float, float],
    kl: tuple[float, str, str],
) -> None:
    training = FAMILY[name]().settings.training
    assert (training.advantage, training.loss) == (advantage, loss)
    assert training.whiten_advantages is whitened
    assert training.loss_aggregation == aggregation
    assert (training.clip_low, training.clip_high) == clip
    assert (training.kl_coef, training.kl_in, training.kl_estimator) == kl


FORMULA = [
    "advantage",
    "loss",
    "whiten_advantages",
    "loss_aggregation",
    "clip_low",
    "clip_high",
    "kl_coef",
    "kl_in",
    "kl_estimator",
]


@every_algorithm
def test_beyond_the_formula_the_defaults_are_the_librarys(name: str) -> None:
    others = {
        "DAPO": {"rollouts.dynamic_sampling": True, "training.mask_truncated": True},
        "OPO": {"training.num_minibatches": 1},
        "SAPO": {"training.loss_args": {"temperature_positive": 1.0, "temperature_negative": 1.05}},
    }
    found = differences(FAMILY[name]())
    of_formula = {f"training.{setting}" for setting in FORMULA}
    assert {field: value for field, value in found.items() if field not in of_formula} == others.get(name, {})


@pytest.mark.parametrize(
    ("name", "paper"),
    [
        ("GRPO", "2402.03300"),
        ("DrGRPO", "2503.20783"),
        ("RLOO", "2402.14740"),
        ("ReinforcePP", "2501.03262"),
        ("ReinforcePPBaseline", "2501.03262"),
        ("DAPO", "2503.14476"),
        ("GSPO", "2507.18071"),
        ("CISPO", "2506.13585"),
        ("SAPO", "2511.20347"),
        ("GMPO", "2507.20673"),
        ("OPO", "2505.23585"),
        ("MaxRL", "2602.02710"),
        ("ReMax", "2310.10505"),
    ],
)
def test_docstrings_cite_the_paper(name: str, paper: str) -> None:
    assert f"arXiv:{paper}" in (FAMILY[name].__doc__ or "")


@every_algorithm
def test_advantage_and_loss_can_be_called_with_the_arguments_given(name: str) -> None:
    training = FAMILY[name]().settings.training
    for plugin in (
        advantage_plugin(training.advantage, training.advantage_args).loaded(),
        loss_plugin(training.loss, training.loss_args).loaded(),
    ):
        function: Any = plugin.function
        given = {*plugin.required_inputs, *plugin.arguments}
        inspect.signature(function).bind(**dict.fromkeys(given))


# --- reading, writing, showing --------------------------------------------------------------------------------------


def test_yaml_changes_only_what_it_names() -> None:
    read = AlgorithmConfig.from_yaml("algorithm: GRPO\ntraining: {lr: 1e-6}")
    assert type(read) is GRPOConfig
    assert read == GRPOConfig().training(lr=1e-6)
    assert read.settings.training.kl_coef == 0.04
    assert GRPOConfig.from_yaml("training: {lr: 1e-6}\n") == read


@every_algorithm
def test_the_name_alone_gives_the_defaults(name: str) -> None:
    read = AlgorithmConfig.from_dict({"algorithm": name})
    assert type(read) is FAMILY[name]
    assert read == FAMILY[name]()


@every_algorithm
def test_yaml_and_dictionaries_give_back_the_same_config(name: str) -> None:
    # Back at the default of settings.py where the algorithm has one of its own: must be written all the same.
    plain = Settings().training
    back = {"advantage": plain.advantage, "kl_coef": plain.kl_coef, "clip_high": plain.clip_high}
    for changed in (FAMILY[name](), FAMILY[name]().training(**back).rollouts(dynamic_sampling=False)):
        assert AlgorithmConfig.from_yaml(changed.to_yaml()) == changed
        assert FAMILY[name].from_yaml(changed.to_yaml()) == changed
        assert AlgorithmConfig.from_dict(changed.to_dict()) == changed
        assert FAMILY[name].from_dict(changed.to_dict()) == changed


@pytest.mark.parametrize("name", [name for name in FAMILY if name != "PPO"])
def test_a_file_of_another_algorithm_is_refused(name: str) -> None:
    error = error_of(lambda: PPOConfig.from_yaml(FAMILY[name]().to_yaml()))
    assert (error.field, error.value) == ("algorithm", name)
    assert f"read them with {name}Config" in error.remedy


@every_algorithm
def test_repr_shows_what_differs_from_the_algorithms_own_defaults(name: str) -> None:
    fresh = FAMILY[name]()
    assert repr(fresh) == f"{name}Config()"
    assert repr(fresh.copy().training(lr=1e-5)) == f"{name}Config().training(lr=1e-05)"
    # What the algorithm has anyway is not shown again.
    assert repr(fresh.copy().training(loss=fresh.settings.training.loss)) == f"{name}Config()"


def test_repr_shows_a_return_to_the_librarys_default() -> None:
    changed = GRPOConfig().training(kl_coef=0.0, advantage="gae")
    assert repr(changed) == "GRPOConfig().training(advantage='gae', kl_coef=0.0)"
    assert eval(repr(changed)) == changed


def test_configs_of_different_algorithms_are_never_equal() -> None:
    assert GRPOConfig() != PPOConfig()
    assert GRPOConfig() != PPOConfig().training(**GRPOConfig.defaults["training"])


def test_defaults_do_not_leak_into_other_algorithms() -> None:
    before = differences(PPOConfig())
    for config_class in FAMILY.values():
        config_class()
    assert before == differences(PPOConfig()) == {}
    assert AlgorithmConfig.from_dict({}) == PPOConfig()


def test_a_mapping_among_the_defaults_is_each_configs_own() -> None:
    first = SAPOConfig()
    first.settings.training.loss_args["temperature_positive"] = 99.0
    assert SAPOConfig().settings.training.loss_args == {"temperature_positive": 1.0, "temperature_negative": 1.05}
    assert PPOConfig().settings.training.loss_args == {}


def test_other_ways_to_set_a_default_win() -> None:
    assert GRPOConfig().training(kl_coef=0.5).settings.training.kl_coef == 0.5
    assert GRPOConfig().apply_overrides(["training.kl_coef=0.25"]).settings.training.kl_coef == 0.25
    assert GRPOConfig.from_dict({"training.kl_coef": 0.125}).settings.training.kl_coef == 0.125


# --- trainables -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trainables() -> ModuleType:
    return importlib.import_module("rlhf_ray.tune.trainables")


@every_algorithm
def test_the_trainable_of_each(name: str, trainables: ModuleType) -> None:
    trainable = getattr(rlhf_ray, name)
    assert trainable is getattr(trainables, name)
    assert issubclass(trainable, rlhf_ray.Algorithm)
    assert trainable.config_class is FAMILY[name]
    # Ray Tune names trials by it.
    assert trainable.__name__ == name
    assert FAMILY[name]().algorithm_class is trainable


@every_algorithm
def test_trainables_travel_by_name(name: str, trainables: ModuleType) -> None:
    from ray import cloudpickle

    trainable = getattr(trainables, name)
    for pickler in (pickle, cloudpickle):
        parcel = pickler.dumps(trainable)
        assert pickle.loads(parcel) is trainable
        assert len(parcel) < 200, "a class sent by value would be another class there"


def test_every_trainable_is_exported_and_no_two_are_the_same(trainables: ModuleType) -> None:
    assert set(FAMILY) <= set(vars(trainables))
    assert len({getattr(trainables, name) for name in FAMILY}) == len(FAMILY)


# --- algorithms of the user's ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_names")
def test_a_users_algorithm_has_its_own_name_and_defaults() -> None:
    class MineConfig(AlgorithmConfig):
        algorithm_name = "Mine"
        defaults = {"training": {"advantage": "rloo", "clip_high": 0.4}, "rollouts": {"group_size": 6}}  # noqa: RUF012

    mine = MineConfig().validate()
    assert differences(mine) == {
        "rollouts.group_size": 6,
        "training.advantage": "rloo",
        "training.clip_high": 0.4,
    }
    assert repr(mine) == "MineConfig()"
    read = AlgorithmConfig.from_yaml("algorithm: Mine\nrollouts: {group_size: 2}\n")
    assert type(read) is MineConfig
    assert read == MineConfig().rollouts(group_size=2)
    assert AlgorithmConfig.from_yaml(mine.to_yaml()) == mine
    assert differences(PPOConfig()) == {}


@pytest.mark.usefixtures("own_names")
@pytest.mark.parametrize(
    ("wrong", "field", "remedy"),
    [
        ({"training": {"learning_rate": 1e-5}}, "training.learning_rate", "did you mean training.lr?"),
        ({"training": {"lr": "fast"}}, "training.lr", "must be a number"),
    ],
)
def test_wrong_defaults_are_found_where_the_config_is_made(wrong: dict[str, Any], field: str, remedy: str) -> None:
    class WrongConfig(AlgorithmConfig):
        algorithm_name = "Wrong"
        defaults = wrong

    error = error_of(WrongConfig)
    assert error.field == field
    assert remedy in error.remedy


MINE = """
from rlhf_ray import AlgorithmConfig


class OfFileConfig(AlgorithmConfig):
    __slots__ = ()

    algorithm_name = "OfFile"
    defaults = {"training": {"advantage": "rloo", "clip_high": 0.4}}


class Nameless(AlgorithmConfig): ...
"""


@pytest.fixture
def of_file(own_names: None, tmp_path: Path) -> Path:
    path = tmp_path / "of_file.py"
    path.write_text(MINE)
    return path


def test_an_algorithm_of_a_file_is_named_by_it(of_file: Path) -> None:
    reference = f"{of_file}:OfFileConfig"
    config = AlgorithmConfig.from_yaml(f"algorithm: {reference}\ntraining: {{lr: 1e-5}}\n")
    assert differences(config) == {"training.advantage": "rloo", "training.clip_high": 0.4, "training.lr": 1e-5}
    assert AlgorithmConfig.from_yaml("{}\n", algorithm=reference).apply_overrides(
        [f"algorithm={reference}", "training.lr=1e-5"]
    ) == (config)
    assert AlgorithmConfig.from_yaml("algorithm: OfFile\ntraining: {lr: 1e-5}") == config, "it is registered by now"
    assert type(config).from_yaml(config.to_yaml()) == config
    assert AlgorithmConfig.from_dict(config.to_dict()) == config


def test_what_is_written_names_the_file_so_that_another_process_reruns_it(of_file: Path) -> None:
    config = AlgorithmConfig.from_dict({"algorithm": f"{of_file}:OfFileConfig"})
    assert f"algorithm: {of_file}:OfFileConfig\n" in config.to_yaml()
    script = "import sys; from rlhf_ray import AlgorithmConfig; print(AlgorithmConfig.from_yaml(sys.stdin.read()))"
    done = subprocess.run(
        [sys.executable, "-c", script], input=config.to_yaml(), capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "OfFileConfig()"


def test_an_algorithm_of_a_module_is_named_by_it(of_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(of_file.parent)
    config = AlgorithmConfig.from_dict({"algorithm": "of_file:OfFileConfig"})
    assert "algorithm: of_file:OfFileConfig\n" in config.to_yaml()
    del sys.modules["of_file"]


def test_the_trainable_of_a_file_works_where_the_file_is_not(of_file: Path) -> None:
    from ray import cloudpickle

    trainable = AlgorithmConfig.from_dict({"algorithm": f"{of_file}:OfFileConfig"}).algorithm_class
    assert trainable.__name__ == "OfFile"
    payload = cloudpickle.dumps(trainable)
    of_file.unlink()
    script = (
        "import pickle, sys; trainable = pickle.load(sys.stdin.buffer); "
        "print(repr(trainable.config_class.from_dict({'algorithm': 'OfFile', 'training.lr': 1e-5})))"
    )
    done = subprocess.run([sys.executable, "-c", script], input=payload, capture_output=True, timeout=120, check=True)
    assert done.stdout.decode().strip() == "OfFileConfig().training(lr=1e-05)"


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("json:dumps", "must be a subclass of AlgorithmConfig with an algorithm_name"),
        ("{file}:Nameless", "must be a subclass of AlgorithmConfig with an algorithm_name"),
        ("{file}:OfFile", "has no 'OfFile'; nearest: 'OfFileConfig'"),
        ("nowhere.py:Mine", "there is no file"),
    ],
)
def test_a_reference_that_is_no_algorithm(of_file: Path, name: str, remedy: str) -> None:
    name = name.replace("{file}", str(of_file))
    error = error_of(lambda: AlgorithmConfig.from_dict({"algorithm": name}))
    assert (error.field, error.value) == ("algorithm", name)
    assert remedy in error.remedy


@pytest.mark.usefixtures("own_names")
def test_an_override_does_not_name_the_parent_of_an_algorithm() -> None:
    class MineConfig(GRPOConfig):
        algorithm_name = "Mine"

    error = error_of(lambda: MineConfig().apply_overrides(["algorithm=GRPO"]))
    assert error.remedy == "this is a config of Mine; start from GRPOConfig()"


@pytest.mark.usefixtures("own_names")
def test_the_name_of_another_algorithm_is_taken() -> None:
    def define() -> None:
        class OtherConfig(AlgorithmConfig):
            algorithm_name = "GRPO"

    error = error_of(define)
    assert (error.field, error.value) == ("algorithm_name", "GRPO")
    assert "GRPOConfig; choose another one" in error.remedy
    assert type(AlgorithmConfig.from_dict({"algorithm": "GRPO"})) is GRPOConfig


# --- impossible combinations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPARE_GROUPS)
def test_algorithms_that_compare_completions_need_two(name: str) -> None:
    error = error_of(FAMILY[name]().rollouts(group_size=1).validate)
    assert (error.field, error.value) == ("rollouts.group_size", 1)
    advantage = FAMILY[name]().settings.training.advantage
    assert error.remedy == f"{advantage} compares the completions of a prompt; use at least 2"
    FAMILY[name]().rollouts(group_size=2).validate()


@pytest.mark.parametrize("name", ["PPO", "ReMax", "ReinforcePP"])
def test_the_others_need_one(name: str) -> None:
    FAMILY[name]().rollouts(group_size=1).validate()


@pytest.mark.parametrize("name", [name for name in FAMILY if name != "PPO"])
def test_only_ppo_has_a_critic(name: str) -> None:
    advantage = FAMILY[name]().settings.training.advantage
    error = error_of(FAMILY[name]().model(critic_path="owner/critic").validate)
    assert (error.field, error.value) == ("model.critic_path", "owner/critic")
    assert f"{advantage} has no critic" in error.remedy
    error = error_of(FAMILY[name]().training(critic_warmup_iterations=3).validate)
    assert (error.field, error.value) == ("training.critic_warmup_iterations", 3)
    assert f"{advantage} has no critic to warm up; use 0" in error.remedy


REMAX_NORMALIZED = "remax compares with the reward of a greedy completion"


@pytest.mark.parametrize(
    ("config_class", "changes", "field", "remedy"),
    [
        (PPOConfig, {"rollouts.dynamic_sampling": True, "rollouts.group_size": 1}, "rollouts.group_size", "is always"),
        (PPOConfig, {"rewards.normalize": "group", "rollouts.group_size": 1}, "rollouts.group_size", "normalize = gro"),
        (
            PPOConfig,
            {"rewards.leave_one_out": True},
            "rewards.leave_one_out",
            "set rewards.normalize to group or batch",
        ),
        (ReMaxConfig, {"rewards.normalize": "group"}, "rewards.normalize", REMAX_NORMALIZED),
        (ReMaxConfig, {"rewards.normalize": "batch"}, "rewards.normalize", REMAX_NORMALIZED),
        (PPOConfig, {"training.kl_target": 0.1}, "training.kl_target", "give training.kl_coef"),
        (DAPOConfig, {"training.kl_target": 0.1}, "training.kl_target", "give training.kl_coef"),
        # 64 x 4 completions.
        (GRPOConfig, {"training.kl_target": 0.1, "training.kl_horizon": 51}, "training.kl_horizon", "more than 51"),
        (GRPOConfig, {"training.advantage": "grop"}, "training.advantage", "did you mean grpo?"),
        (GRPOConfig, {"training.loss": "gspoo"}, "training.loss", "did you mean gspo?"),
        # A loss is no advantage, and the other way round.
        (PPOConfig, {"training.advantage": "sapo"}, "training.advantage", "no such function"),
        (PPOConfig, {"training.loss": "rloo"}, "training.loss", "no such function"),
    ],
)
def test_impossible_combinations(config_class: Config, changes: dict[str, Any], field: str, remedy: str) -> None:
    error = error_of(config_class.from_dict(changes).validate)
    assert error.field == field
    section, _, name = field.partition(".")
    assert error.value == changes.get(field, getattr(getattr(Settings(), section), name))
    assert remedy in error.remedy


@pytest.mark.parametrize(
    ("config_class", "changes"),
    [
        (PPOConfig, {"rollouts.dynamic_sampling": True, "rollouts.group_size": 2}),
        (PPOConfig, {"rewards.normalize": "batch", "rollouts.group_size": 1}),
        (PPOConfig, {"rewards.normalize": "batch", "rewards.leave_one_out": True}),
        (PPOConfig, {"model.critic_path": "owner/critic", "training.critic_warmup_iterations": 3}),
        (GRPOConfig, {"training.advantage": "gae", "training.critic_warmup_iterations": 3}),
        (ReMaxConfig, {"rewards.bias": 1.0, "rewards.scale": 2.0, "rewards.clip": 3.0}),
        (GRPOConfig, {"training.kl_target": 0.1, "training.kl_horizon": 52}),
        (PPOConfig, {"training.kl_horizon": 1}),
        # k1 in the reward is measured all the same.
        (RLOOConfig, {"training.kl_target": 0.1}),
        (PPOConfig, {"training.kl_coef": 0.1, "training.kl_in": "loss"}),
        # Imported when the run starts.
        (GRPOConfig, {"training.advantage": "not_yet_written:f", "training.loss": "./not_yet_written.py:f"}),
    ],
)
def test_possible_combinations(config_class: Config, changes: dict[str, Any]) -> None:
    config_class.from_dict(changes).validate()


@pytest.mark.usefixtures("own_names")
def test_a_registered_advantage_says_by_its_parameters_what_settings_fit() -> None:
    @register_advantage("best_of_group")
    def best_of_group(rewards: Any, group_ids: Any) -> Any: ...

    @register_advantage("own_critic")
    def own_critic(rewards: Any, values: Any, mask: Any) -> Any: ...

    best = PPOConfig().training(advantage="best_of_group")
    assert "best_of_group compares" in error_of(best.copy().rollouts(group_size=1).validate).remedy
    assert "best_of_group has no critic" in error_of(best.copy().model(critic_path="owner/critic").validate).remedy
    GRPOConfig().training(advantage="own_critic").model(critic_path="owner/critic").rollouts(group_size=1).validate()


def test_a_file_of_settings_is_read_by_the_class_at_hand_when_the_one_it_names_has_moved() -> None:
    text = f"algorithm: /not/there.py:{GRPOConfig.__qualname__}\n"
    assert type(GRPOConfig.from_yaml(text)) is GRPOConfig
    with pytest.raises(ConfigError, match="there is no file"):
        PPOConfig.from_yaml(text)
