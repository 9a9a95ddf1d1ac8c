"""The examples of environments: their configurations are valid, and what they define plays."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rlhf_ray import Action, PPOConfig
from rlhf_ray.environments.registry import resolve_environments
from rlhf_ray.quickstart import model_path

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    yield load


def action(text: str) -> Action:
    return Action(text=text, message={"role": "assistant", "content": text}, token_ids=(), truncated=False)


def test_the_text_game_gives_hints_and_ends(example: Any) -> None:
    text_game = example("text_game")
    config = text_game.config().validate()
    (environment,) = resolve_environments(config.settings.environment)
    game = environment.make()
    assert game.reset({}, 3) == "1-7="
    wrong = [digit for digit in "1234567" if int(digit) != game.number]
    for digit in wrong:
        step = game.step(action(digit))
        assert step.observation == ("+" if int(digit) < game.number else "-")
        assert not step.done
    assert game.step(action(str(game.number))).reward == 1.0
    for text in ("8", "0", "", " 4", "12", "४", "²"):
        assert game.step(action(text)).reward == -1.0


def test_the_agent_asks_twice_and_is_graded(example: Any, tmp_path: Path) -> None:
    agent = example("openai_agent")
    config = agent.config(model_path()).validate()
    assert config.settings.environment.agent is agent.solve
    assert len(list(agent.rows())) == 100
    asked: list[str] = []

    async def create(*, model: str, messages: list[dict[str, str]], max_tokens: int) -> Any:
        asked.append(messages[0]["content"])
        text = "It is 7." if len(asked) == 1 else "8"
        return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=text))])

    client = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))
    reward = asyncio.run(agent.solve({"prompt": "What is 3 + 5?", "answer": "8"}, client))
    assert reward == pytest.approx(0.7)
    assert "A student answered: It is 7." in asked[1]


def test_a_sweep_over_arguments_of_an_environment(example: Any) -> None:
    from ray.tune.search.variant_generator import generate_variants

    space = example("tune_environment").space(iterations=2)
    largest = []
    for _, resolved in generate_variants(space):
        config = PPOConfig.from_dict(resolved).validate()
        (environment,) = resolve_environments(config.settings.environment)
        largest.append(environment.make().largest)
    assert sorted(largest) == [3, 7]


def test_the_calculator_of_gsm8k_is_a_tool(example: Any) -> None:
    module = example("gsm8k_calculator")
    from rlhf_ray.environments.tools import tool_schemas

    (schema,) = tool_schemas([module.calculator])
    assert schema["function"]["name"] == "calculator"
    assert float(module.calculator("(3 + 4) * 12")) == 84
