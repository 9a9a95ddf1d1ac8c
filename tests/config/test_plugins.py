from __future__ import annotations

import functools
import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from rlhf_ray import ConfigError, register_advantage, register_loss
from rlhf_ray.config import plugins
from rlhf_ray.config.plugins import (
    ADVANTAGES,
    LOSSES,
    OF_LOSS,
    PER_COMPLETION,
    PER_TOKEN,
    Plugin,
    advantage_plugin,
    loss_plugin,
)
from rlhf_ray.config.settings import TrainingSettings
from rlhf_ray.pickling import serialize

BUILT_IN_ADVANTAGES = ("dr_grpo", "gae", "grpo", "maxrl", "opo", "reinforce_plus_plus", "remax", "rloo", "turn_gae")
BUILT_IN_LOSSES = ("cispo", "gmpo", "gspo", "ppo", "sapo")

TEMPERATURES = {"temperature_positive": 1.0, "temperature_negative": 1.05}
# Arguments without which a loss cannot be called, as its algorithm's configuration gives them.
NEEDED = {"sapo": TEMPERATURES}

FILE = """
SCALE = 10.0


def centered(values):
    return [SCALE * (value - sum(values) / len(values)) for value in values]


def above_mean(rewards, group_ids, shift=0.0):
    return [value + shift for value in centered(rewards)]
"""

ELSEWHERE = """
import pickle, sys
plugin = pickle.loads(sys.stdin.buffer.read()).loaded()
print(plugin.name, plugin.call({"rewards": [1.0, 3.0], "group_ids": [7, 7], "lengths": [1, 1]}))
"""


@pytest.fixture(autouse=True)
def nothing_stays_registered() -> Iterator[None]:
    before = [(table, dict(table)) for table in (plugins.ADVANTAGES.plugins, plugins.LOSSES.plugins)]
    yield
    for table, old in before:
        table.clear()
        table.update(old)


def error_of(call: Callable[[], object]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        call()
    return caught.value


def built_in(name: str) -> Plugin:
    if name in BUILT_IN_ADVANTAGES:
        return advantage_plugin(name, {}).loaded()
    return loss_plugin(name, NEEDED.get(name, {})).loaded()


def parameters(plugin: Plugin) -> Mapping[str, inspect.Parameter]:
    function: Any = plugin.function
    return inspect.signature(function).parameters


def tokens(*rows: list[float]) -> Any:
    import torch

    return torch.tensor(rows)


# --- built-in functions ---------------------------------------------------------------------------------------------


def test_the_built_in_names() -> None:
    for table, names in ((ADVANTAGES.plugins, BUILT_IN_ADVANTAGES), (LOSSES.plugins, BUILT_IN_LOSSES)):
        # Functions of the user's are no references.
        assert sorted(name for name, plugin in table.items() if isinstance(plugin.function, str)) == sorted(names)


@pytest.mark.parametrize(("setting", "names"), [("advantage", BUILT_IN_ADVANTAGES), ("loss", BUILT_IN_LOSSES)])
def test_the_help_of_the_setting_lists_every_built_in(setting: str, names: tuple[str, ...]) -> None:
    meaning = next(item.metadata["meaning"] for item in fields(TrainingSettings) if item.name == setting)
    listed = meaning.partition(": ")[2].split(", ")
    assert sorted(listed[: len(names)]) == sorted(names)


@pytest.mark.parametrize("name", [*BUILT_IN_ADVANTAGES, *BUILT_IN_LOSSES])
def test_a_built_in_requires_every_input_that_its_function_takes(name: str) -> None:
    plugin = built_in(name)
    taken = parameters(plugin)
    inputs = OF_LOSS if name in BUILT_IN_LOSSES else PER_TOKEN if "mask" in taken else PER_COMPLETION
    assert set(plugin.required_inputs) == set(taken) & set(inputs)
    assert len(set(plugin.required_inputs)) == len(plugin.required_inputs)


@pytest.mark.parametrize("name", [*BUILT_IN_ADVANTAGES, *BUILT_IN_LOSSES])
def test_nothing_that_a_built_in_needs_is_missing_and_nothing_is_given_twice(name: str) -> None:
    plugin = built_in(name)
    needed = {key for key, parameter in parameters(plugin).items() if parameter.default is parameter.empty}
    assert needed <= {*plugin.required_inputs, *plugin.arguments}
    assert set(plugin.arguments) <= set(parameters(plugin)) - set(plugin.required_inputs)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("ppo", "ppo_loss"),
        ("gspo", "gspo_loss"),
        ("cispo", "cispo_loss"),
        ("gmpo", "gmpo_loss"),
        ("sapo", "sapo_loss"),
    ],
)
def test_each_loss_is_the_function_of_its_name(name: str, function: str) -> None:
    import rlhf_ray.losses

    assert built_in(name).function is getattr(rlhf_ray.losses, function)


# Name -> needs a critic, compares groups, one advantage a completion, needs greedy rewards.
@pytest.mark.parametrize(
    ("name", "critic", "groups", "per_completion", "greedy"),
    [
        ("gae", True, False, False, False),
        ("grpo", False, True, True, False),
        ("dr_grpo", False, True, True, False),
        ("rloo", False, True, True, False),
        ("opo", False, True, True, False),
        ("maxrl", False, True, True, False),
        ("reinforce_plus_plus", False, False, False, False),
        ("remax", False, False, True, True),
    ],
)
def test_what_each_advantage_needs_of_the_run(
    name: str, critic: bool, groups: bool, per_completion: bool, greedy: bool
) -> None:
    plugin = ADVANTAGES.plugins[name]
    assert plugin.needs_critic is critic
    assert plugin.compares_groups is groups
    assert plugin.per_completion is per_completion
    assert plugin.needs_greedy_rewards is greedy


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        # Rewards 0, 0, 3 with lengths 1, 1, 2: mean 1, deviations -1, -1, 2, standard deviation sqrt(6 / 2).
        ("grpo", [-1 / 3**0.5, -1 / 3**0.5, 2 / 3**0.5]),
        ("dr_grpo", [-1.0, -1.0, 2.0]),
        # Means of the others: 1.5, 1.5, 0.
        ("rloo", [-1.5, -1.5, 3.0]),
        # Baseline (0 + 0 + 2 * 3) / 4.
        ("opo", [-1.5, -1.5, 1.5]),
        ("maxrl", [-1.0, -1.0, 2.0]),
    ],
)
def test_group_methods_by_hand(method: str, expected: list[float]) -> None:
    import torch

    available = {
        "rewards": torch.tensor([0.0, 0.0, 3.0]),
        "group_ids": torch.tensor([5, 5, 5]),
        "lengths": torch.tensor([1, 1, 2]),
        "greedy_rewards": None,
    }
    torch.testing.assert_close(built_in(method).call(available), torch.tensor(expected))


def test_grpo_and_maxrl_are_told_apart_by_the_scale() -> None:
    import torch

    # Mean 3, standard deviation sqrt(2).
    available = {"rewards": torch.tensor([2.0, 4.0]), "group_ids": torch.tensor([0, 0]), "lengths": None}
    torch.testing.assert_close(built_in("maxrl").call(available), torch.tensor([-1 / 3, 1 / 3]))
    torch.testing.assert_close(built_in("grpo").call(available), torch.tensor([-(0.5**0.5), 0.5**0.5]))


def test_gae_gives_advantages_and_returns_by_hand() -> None:
    import torch

    available = {
        "rewards": tokens([0.0, 2.0]),
        "values": tokens([1.0, 3.0]),
        "mask": tokens([1.0, 1.0]).bool(),
        "bootstrap": torch.tensor([4.0]),
        "gamma": 0.5,
        "lam": 0.25,
        "critic_lam": None,
        "length_alpha": None,
        "a stranger": None,
    }
    # Last: 2 + 0.5 * 4 - 3 = 1. First: 0.5 * 3 - 1 + 0.125 * 1 = 0.625.
    advantages, returns = built_in("gae").call(available)
    assert advantages.tolist() == [[0.625, 1.0]]
    assert returns.tolist() == [[1.625, 4.0]]


def test_reinforce_plus_plus_and_remax_by_hand() -> None:
    import torch

    of_tokens = {"rewards": tokens([1.0, 4.0]), "mask": tokens([1.0, 1.0]).bool(), "gamma": 0.5, "values": None}
    assert built_in("reinforce_plus_plus").call(of_tokens).tolist() == [[3.0, 4.0]]

    of_completions = {"rewards": torch.tensor([1.0, 0.0]), "greedy_rewards": torch.tensor([0.25, 0.75])}
    assert built_in("remax").call(of_completions).tolist() == [0.75, -0.75]


@pytest.mark.parametrize("name", BUILT_IN_LOSSES)
def test_a_loss_gets_every_setting(name: str) -> None:
    import torch

    old = tokens([0.5, 0.4, 0.3], [0.2, 0.5, 0.1]).log()
    new = tokens([0.9, 0.2, 0.3], [0.1, 0.5, 0.8]).log()
    available: dict[str, Any] = {
        "logprobs": new,
        "old_logprobs": old,
        "advantages": tokens([1.0, -2.0, 0.5], [-1.0, 3.0, -1.5]),
        "mask": tokens([1.0, 1.0, 0.0], [1.0, 1.0, 1.0]).bool(),
        "clip_low": 0.1,
        "clip_high": 0.3,
        "dual_clip": 1.5,
        "behavior_weights": tokens([0.5, 1.0, 1.0], [2.0, 1.0, 0.25]),
        "aggregation": "seq_mean_token_mean",
        "normalizer": 7.0,
    }
    plugin = built_in(name)
    taken = parameters(plugin)
    function: Any = plugin.function
    wanted, wanted_metrics = function(
        **{key: value for key, value in available.items() if key in taken}, **NEEDED.get(name, {})
    )
    loss, metrics = plugin.call(available)
    assert torch.equal(loss, wanted)
    assert metrics.keys() == wanted_metrics.keys()
    # Each setting moves this loss, so that one that is not passed on would be seen above.
    for setting, other in [("behavior_weights", None), ("aggregation", "token_mean"), ("normalizer", 9.0)]:
        assert plugin.call(available | {setting: other})[0] != loss
    if name == "ppo":
        assert plugin.call(available | {"dual_clip": None})[0] != loss


def test_further_arguments_keep_the_built_in_ones() -> None:
    import torch

    # Standard deviation sqrt(2), deviations -1 and 1.
    available = {"rewards": torch.tensor([2.0, 4.0]), "group_ids": torch.tensor([0, 0]), "lengths": None}
    plugin = advantage_plugin("grpo", {"eps": 1.0})
    assert plugin.arguments == {"method": "grpo", "eps": 1.0}
    expected = torch.tensor([-1.0, 1.0]) / (2**0.5 + 1.0)
    torch.testing.assert_close(plugin.loaded().call(available), expected)
    assert ADVANTAGES.plugins["grpo"].arguments == {"method": "grpo"}, "the table is untouched"


def test_nothing_heavy_is_imported() -> None:
    script = """
import sys
from rlhf_ray.config.plugins import ADVANTAGES, advantage_plugin, loss_plugin
for name in ADVANTAGES.plugins:
    advantage_plugin(name, {})
loss_plugin("gspo", {})
print(sorted({"numpy", "ray", "torch"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


# --- registered functions -------------------------------------------------------------------------------------------


def test_a_registered_advantage_gets_what_it_takes_and_nothing_else() -> None:
    @register_advantage("longest")
    def longest(lengths: list[int], rewards: list[float], power: int = 1) -> list[float]:
        return [reward * length**power for reward, length in zip(rewards, lengths, strict=True)]

    available = {"rewards": [1.0, 2.0], "group_ids": [0, 0], "lengths": [3, 5], "greedy_rewards": [9.0, 9.0]}
    plugin = advantage_plugin("longest", {})
    assert plugin.required_inputs == ("lengths", "rewards")
    assert plugin.loaded().call(available) == [3.0, 10.0]
    assert advantage_plugin("longest", {"power": 2}).loaded().call(available) == [9.0, 50.0]
    assert advantage_plugin("longest", {}).arguments == {}, "arguments are not remembered"
    assert longest([2], [1.0]) == [2.0], "the decorator returns the function"


def test_a_registered_loss_gets_what_it_takes_and_nothing_else() -> None:
    @register_loss("plain")
    def plain(logprobs: float, advantages: float, normalizer: float, slope: float = 1.0) -> float:
        return -slope * logprobs * advantages / normalizer

    available = dict.fromkeys(OF_LOSS) | {"logprobs": 3.0, "advantages": 4.0, "normalizer": 2.0}
    assert loss_plugin("plain", {}).required_inputs == ("logprobs", "advantages", "normalizer")
    assert loss_plugin("plain", {"slope": 0.5}).loaded().call(available) == -3.0


def test_the_parameters_say_what_the_run_needs() -> None:
    @register_advantage("of_tokens")
    def of_tokens(rewards: Any, values: Any, mask: Any, lam: float, group_ids: Any = None) -> Any: ...

    @register_advantage("of_completions")
    def of_completions(rewards: Any, greedy_rewards: Any, group_ids: Any, gamma: float = 0.5) -> Any: ...

    first, second = advantage_plugin("of_tokens", {}), advantage_plugin("of_completions", {})
    # A function of tokens sees its rank's rows alone, which hold no whole groups; one of completions has no discount.
    assert first.required_inputs == ("rewards", "values", "mask", "lam")
    assert second.required_inputs == ("rewards", "greedy_rewards", "group_ids")
    assert (first.needs_critic, first.compares_groups, first.per_completion) == (True, False, False)
    assert (second.needs_critic, second.compares_groups, second.per_completion) == (False, True, True)
    assert (first.needs_greedy_rewards, second.needs_greedy_rewards) == (False, True)


def test_advantages_and_losses_do_not_share_names() -> None:
    @register_advantage("gspo")
    def gspo(rewards: Any) -> Any: ...

    assert advantage_plugin("gspo", {}).required_inputs == ("rewards",)
    assert loss_plugin("gspo", {}) == LOSSES.plugins["gspo"]


@pytest.mark.parametrize(
    ("register", "name", "setting"),
    [(register_advantage, "grpo", "training.advantage"), (register_loss, "ppo", "training.loss")],
)
def test_the_name_of_a_built_in_is_taken(register: Callable[[str], Any], name: str, setting: str) -> None:
    def mine(rewards: Any, logprobs: Any) -> Any: ...

    error = error_of(lambda: register(name)(mine))
    assert (error.field, error.value) == (setting, name)
    assert "taken" in error.remedy
    assert (ADVANTAGES.plugins | LOSSES.plugins)[name].function != mine


def test_the_name_of_another_function_is_taken() -> None:
    def first(rewards: Any) -> Any: ...

    def second(rewards: Any) -> Any: ...

    register_advantage("shared")(first)
    assert "taken" in error_of(lambda: register_advantage("shared")(second)).remedy
    assert advantage_plugin("shared", {}).function is first


def test_a_function_whose_module_is_run_again_is_replaced() -> None:
    def run_module(value: float) -> None:
        @register_advantage("again")
        def again(rewards: Any) -> float:
            return value

    run_module(1.0)
    run_module(2.0)
    assert advantage_plugin("again", {}).loaded().call({"rewards": None}) == 2.0


def test_a_function_that_takes_no_input_is_refused() -> None:
    def of_nothing(scale: float = 1.0) -> Any: ...

    error = error_of(lambda: register_advantage("of_nothing")(of_nothing))
    assert error.field == "training.advantage"
    assert "must take rewards; it may take group_ids, lengths, greedy_rewards" in error.remedy
    assert (
        "must take logprobs; it may take old_logprobs"
        in error_of(lambda: register_loss("of_nothing")(of_nothing)).remedy
    )
    assert "of_nothing" not in {*ADVANTAGES.plugins, *LOSSES.plugins}


# --- finding them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("find", "name", "field", "hint"),
    [
        (advantage_plugin, "gpro", "training.advantage", "did you mean grpo?"),
        (advantage_plugin, "reinforce++", "training.advantage", "did you mean reinforce_plus_plus?"),
        (loss_plugin, "gsp", "training.loss", "did you mean gspo?"),
        (loss_plugin, "zzz", "training.loss", "there are cispo, gmpo, gspo, ppo, sapo ("),
        # Names of the other table.
        (loss_plugin, "gae", "training.loss", "no such function"),
        (advantage_plugin, "cispo", "training.advantage", "no such function"),
    ],
)
def test_an_unknown_name_names_the_nearest(find: Callable[..., Plugin], name: str, field: str, hint: str) -> None:
    error = error_of(lambda: find(name, {}))
    assert (error.field, error.value) == (field, name)
    assert hint in error.remedy
    assert "'module:function'" in error.remedy


def test_a_registered_name_is_among_the_nearest() -> None:
    @register_loss("leaky_clip")
    def leaky_clip(logprobs: Any) -> Any: ...

    assert "did you mean leaky_clip?" in error_of(lambda: loss_plugin("leaky_clp", {})).remedy


@pytest.mark.parametrize(
    ("find", "name", "arguments", "field", "remedy"),
    [
        (
            advantage_plugin,
            "grpo",
            {"epsilon": 1e-3},
            "training.advantage_args",
            "no argument 'epsilon'; grpo takes eps",
        ),
        # Belongs to the name.
        (
            advantage_plugin,
            "grpo",
            {"method": "rloo"},
            "training.advantage_args",
            "no argument 'method'; grpo takes eps",
        ),
        # Settings of their own.
        (advantage_plugin, "gae", {"lam": 0.9}, "training.advantage_args", "no argument 'lam'; gae takes no arguments"),
        (loss_plugin, "ppo", {"clip_low": 0.1}, "training.loss_args", "no argument 'clip_low'; ppo takes no arguments"),
        (
            loss_plugin,
            "sapo",
            {**TEMPERATURES, "temperature": 1.0},
            "training.loss_args",
            "no argument 'temperature'; sapo takes temperature_positive, temperature_negative",
        ),
    ],
)
def test_an_unknown_argument_names_those_there_are(
    find: Callable[..., Plugin], name: str, arguments: dict[str, Any], field: str, remedy: str
) -> None:
    error = error_of(lambda: find(name, MappingProxyType(arguments)))
    assert (error.field, error.value, error.remedy) == (field, arguments, remedy)


def test_a_function_of_any_arguments_takes_any() -> None:
    @register_advantage("open")
    def open_(rewards: float, **others: float) -> float:
        return rewards + sum(others.values())

    plugin = advantage_plugin("open", {"a": 10.0, "b": 100.0})
    assert plugin.required_inputs == ("rewards",)
    assert plugin.loaded().call({"rewards": 1.0, "lengths": 1000.0}) == 111.0


def test_an_argument_without_default_must_be_given() -> None:
    @register_loss("steep")
    def steep(logprobs: Any, steepness: float) -> Any: ...

    assert loss_plugin("steep", {"steepness": 2.0}).arguments == {"steepness": 2.0}
    error = error_of(lambda: loss_plugin("steep", {}))
    assert error.field == "training.loss_args"
    assert "steepness" in error.remedy


def test_a_built_in_found_by_name_alone_can_be_called_or_is_refused() -> None:
    with suppress(ConfigError):
        plugin = loss_plugin("sapo", {}).loaded()
        needed = {key for key, parameter in parameters(plugin).items() if parameter.default is parameter.empty}
        assert needed <= {*plugin.required_inputs, *plugin.arguments}


# --- functions in files ---------------------------------------------------------------------------------------------


@pytest.fixture
def reference(tmp_path: Path) -> str:
    path = tmp_path / "my_advantages.py"
    path.write_text(FILE)
    return f"{path}:above_mean"


def test_a_function_of_a_file(reference: str) -> None:
    plugin = advantage_plugin(reference, {"shift": 1.0})
    assert plugin.name == reference
    assert plugin.required_inputs == ("rewards", "group_ids")
    assert plugin.compares_groups
    assert plugin.loaded().call({"rewards": [1.0, 3.0], "group_ids": [7, 7]}) == [-9.0, 11.0]
    assert reference not in ADVANTAGES.plugins, "nothing is registered"


def test_a_function_of_a_module() -> None:
    assert loss_plugin("rlhf_ray.losses:gspo_loss", {}).required_inputs == tuple(
        key for key in OF_LOSS if key != "dual_clip"
    ), "asked for by signature"


@pytest.mark.parametrize(
    ("text", "field", "remedy"),
    [
        (":above_maen", "training.advantage", "nearest: 'above_mean'"),
        (":SCALE", "training.advantage", "no function but float"),
        (":centered", "training.advantage", "must take rewards"),
    ],
)
def test_a_wrong_reference(reference: str, text: str, field: str, remedy: str) -> None:
    wrong = reference.rpartition(":")[0] + text
    error = error_of(lambda: advantage_plugin(wrong, {}))
    assert (error.field, error.value) == (field, wrong)
    assert remedy in error.remedy


def test_a_wrong_argument_of_a_file(reference: str) -> None:
    error = error_of(lambda: advantage_plugin(reference, {"shif": 1.0}))
    assert error.field == "training.advantage_args"
    assert error.remedy.endswith("above_mean takes shift")


def test_a_function_of_a_file_works_where_the_file_is_not(reference: str) -> None:
    plugin = advantage_plugin(reference, {"shift": 0.5})
    payload = replace(plugin, function=serialize(plugin.function, defined_by=plugin.function))
    assert isinstance(payload.function, bytes)
    Path(reference.rpartition(":")[0]).unlink()
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], input=pickle.dumps(payload), capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().strip() == f"{reference} [-9.5, 10.5]"


def test_loading_twice_changes_nothing() -> None:
    plugin = built_in("grpo")
    assert plugin.loaded() == plugin


def test_what_a_function_edits_in_place_changes_nothing_else() -> None:
    torch = pytest.importorskip("torch")

    @register_advantage("spoiling")
    def spoiling(rewards: Any, values: Any, mask: Any, steps: Any = ()) -> Any:
        rewards.zero_(), values.zero_(), mask.zero_(), steps.append(1)
        return rewards, values

    @register_loss("spoiling")
    def loss(logprobs: Any, advantages: Any) -> Any:
        logprobs *= 2.0
        advantages.zero_()
        return logprobs.sum(), {}

    steps: list[int] = []
    given = {name: torch.ones(2, 3) for name in ("rewards", "values", "mask", "advantages")}
    for _ in range(2):
        advantage_plugin("spoiling", {"steps": steps}).call(given)
    logprobs = torch.ones(2, 3, requires_grad=True)
    total, _ = loss_plugin("spoiling", {}).call({**given, "logprobs": logprobs})
    total.backward()
    assert steps == []
    assert all(bool((tensor == 1.0).all()) for tensor in (*given.values(), logprobs))
    assert bool((logprobs.grad == 2.0).all())


def test_an_argument_has_one_value() -> None:
    def mine(logprobs: Any, advantages: Any, clip_low: float, sharpness: float = 1.0) -> Any:
        return logprobs.sum(), {}

    bound = functools.partial(mine, clip_low=0.1)
    error = error_of(lambda: register_loss("mine")(bound))
    assert "binds 'clip_low', which every run passes" in str(error)
    register_loss("sharp")(functools.partial(mine, sharpness=2.0))
    assert loss_plugin("sharp", {}).required == ()
    error = error_of(lambda: loss_plugin("sharp", {"sharpness": 3.0}))
    assert error.field == "training.loss_args"
    assert "has a value for 'sharpness' already" in str(error)
