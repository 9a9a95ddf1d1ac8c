from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from environments.games import Echo, Guess, Unseeded

from rlhf_ray import PPOConfig
from rlhf_ray.config.settings import EnvironmentSettings
from rlhf_ray.environments.registry import NamedEnvironment, resolve_environments
from rlhf_ray.errors import ConfigError
from rlhf_ray.pickling import deserialize
from rlhf_ray.rewards.functions import rewards_of_run

FILE = """
from rlhf_ray.environments.environment import Environment, Step

class Shop(Environment):
    def __init__(self, catalog, size=3):
        self.catalog = catalog

    def reset(self, row, seed):
        return self.catalog

    def step(self, action):
        return Step(done=True)

async def solve(row, client):
    return 1.0

def useless(client):
    return 1.0

number = 3
"""


@pytest.fixture
def shop(tmp_path: Path) -> str:
    path = tmp_path / "shop.py"
    path.write_text(FILE)
    return str(path)


def resolved(**values: Any) -> tuple[NamedEnvironment, ...]:
    return resolve_environments(EnvironmentSettings(**values))


def test_a_class_a_file_and_a_mapping_name_environments(shop: str) -> None:
    (guess,) = resolved(name=Guess)
    assert (guess.name, guess.is_agent, guess.deterministic) == ("Guess", False, True)
    (of_file,) = resolved(name={"name": f"{shop}:Shop", "catalog": "items.db"})
    assert of_file.name == "Shop"
    assert deserialize(of_file.serialized()).make().reset({}, 0) == "items.db", "it travels without its file"
    (partial,) = resolved(name=functools.partial(Guess, size=3))
    assert partial.make()._size == 3


def test_rows_name_one_of_several(shop: str) -> None:
    names = {"guess": Guess, "shop": {"name": f"{shop}:Shop", "catalog": "a"}}
    assert [one.name for one in resolved(name=names, column="env")] == ["guess", "shop"]


def test_what_is_not_deterministic_says_so() -> None:
    class Declared(Unseeded):
        deterministic = False

    assert not resolved(name=Declared)[0].deterministic
    assert not resolved(name=functools.partial(Declared))[0].deterministic


def test_agents_are_functions_or_commands(shop: str) -> None:
    (agent,) = resolved(agent=f"{shop}:solve")
    assert agent.is_agent
    assert agent.name == "solve"
    assert deserialize(agent.serialized()).make().__name__ == "solve"
    (program,) = resolved(agent={"command": ["python", "agent.py"]})
    assert deserialize(program.serialized()).make() == {"command": ["python", "agent.py"]}


@pytest.mark.parametrize(
    ("values", "field", "message"),
    [
        ({"name": "calcuator"}, "environment.name", "nearest: 'calculator'"),
        ({"name": Guess()}, "environment.name", "must be a class"),
        ({"name": dict}, "environment.name", "dict has no reset()"),
        ({"name": {"size": 3}}, "environment.name", "a mapping needs a name"),
        ({"name": functools.partial(Guess, size=3), "column": None}, None, None),
        ({"name": {"name": Guess, "sise": 3}}, "environment.name", "no argument 'sise'; nearest: 'size'"),
        ({"name": {"name": Guess, "size": float("nan")}}, "environment.name.size", "finite"),
        ({"name": {"a": {"name": Guess, "x": 1}}, "column": "env"}, "environment.name.a", "no argument 'x'"),
        ({"name": "missing.py:Shop"}, "environment.name", "there is no file"),
        ({"agent": 3}, "environment.agent", "must be a function solve(row, client)"),
        ({"agent": {"comand": ["x"]}}, "environment.agent", "{command: [python, agent.py]}"),
        ({"agent": {"command": []}}, "environment.agent", "{command: [python, agent.py]}"),
        ({"agent": lambda client: 1.0}, "environment.agent", "must take 'row'"),
    ],
)
def test_what_is_no_environment_is_refused(values: dict[str, Any], field: str | None, message: str | None) -> None:
    if field is None:
        assert resolved(**values)
        return
    with pytest.raises(ConfigError) as error:
        resolved(**values)
    assert error.value.field == field
    assert message is not None
    assert message in str(error.value)


def test_arguments_that_are_needed_and_things_that_are_no_class(shop: str) -> None:
    with pytest.raises(ConfigError, match="it needs the argument 'catalog'"):
        resolved(name=f"{shop}:Shop")
    with pytest.raises(ConfigError, match="is no class"):
        resolved(name=f"{shop}:solve")
    with pytest.raises(ConfigError, match="has no 'Shopp'; nearest: 'Shop'"):
        resolved(name=f"{shop}:Shopp")


def test_what_cannot_travel_is_named() -> None:
    import threading

    lock = threading.Lock()

    class Locked(Echo):
        held = lock

    with pytest.raises(ConfigError, match="cannot be sent to a worker"):
        resolved(name=Locked)[0].serialized()


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"name": Guess, "agent": lambda row, client: 1.0}, "environment.agent"),
        ({"name": Guess, "tools": [print]}, "environment.tools"),
        ({"column": "env"}, "environment.column"),
        ({"max_turns": 3}, "environment.max_turns"),
        ({"tool_parser": "hermes"}, "environment.tool_parser"),
        ({"name": Guess, "column": "env"}, "environment.column"),
        ({"name": {"a": Guess}}, "environment.name"),
        ({"name": {}, "column": "env"}, "environment.name"),
        ({"tools": [print]}, "environment.tool_parser"),
        ({"name": Guess, "max_turn_tokens": 9}, "environment.max_turn_tokens"),
        ({"name": Guess, "max_turns": 0}, "environment.max_turns"),
        ({"name": Guess, "step_timeout_s": 10.0, "timeout_s": 5.0}, "environment.step_timeout_s"),
        ({"name": Guess, "num_workers": 0}, "environment.num_workers"),
        ({"name": "calcuator"}, "environment.name"),
        ({"name": {"a": "calcuator"}, "column": "env"}, "environment.name.a"),
        ({"name": Guess, "tool_parser": "hermess"}, "environment.tool_parser"),
        ({"name": Guess, "reasoning_parser": "qwen33"}, "environment.reasoning_parser"),
    ],
)
def test_combinations_that_cannot_work(values: dict[str, Any], field: str) -> None:
    config = PPOConfig().environment(**values)
    if "tools" in values:
        config.rewards("length")
    with pytest.raises(ConfigError) as error:
        config.validate()
    assert error.value.field == field


def test_one_turn_needs_no_environment() -> None:
    assert PPOConfig().environment(max_turns=1).validate()


def test_an_environment_may_be_positional() -> None:
    assert PPOConfig().environment(Guess, max_turns=2).settings.environment.name is Guess
    with pytest.raises(ConfigError, match="by position"):
        PPOConfig().environment(Guess, name=Guess)
    with pytest.raises(ConfigError, match="by position"):
        PPOConfig().environment(Guess, Echo)


def test_yaml_names_environments(shop: str) -> None:
    spec = f"{{guess: 'environments.games:Guess', shop: {{name: '{shop}:Shop', catalog: a}}}}"
    text = f"environment: {{name: {spec}, column: env}}"
    config = PPOConfig.from_yaml(text)
    again = PPOConfig.from_yaml(config.to_yaml())
    assert [one.name for one in resolve_environments(again.settings.environment)] == ["guess", "shop"]
    written = PPOConfig().environment(Guess).to_yaml()
    assert "environments.games:Guess" in written
    assert resolve_environments(PPOConfig.from_yaml(written).settings.environment)[0].name == "Guess"


def test_the_rewards_of_a_run_are_those_of_its_environment() -> None:
    assert rewards_of_run(PPOConfig().environment(Guess).settings).functions == ["environment"]
    assert rewards_of_run(PPOConfig().settings).functions == []
    own = PPOConfig().environment(Guess).rewards("length")
    assert rewards_of_run(own.settings).functions == ["length"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PPOConfig().rewards("environment"), "there is no environment"),
        (PPOConfig().environment(tools=[print], tool_parser="hermes").rewards("environment"), "tools give no rewards"),
        (PPOConfig().environment(tools=[print], tool_parser="hermes"), "tools give no rewards"),
    ],
)
def test_rewards_that_nothing_gives(config: PPOConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        config.validate()
    assert error.value.field == "rewards.functions"
