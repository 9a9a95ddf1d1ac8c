from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.environments.environment import Action, Step
from rlhf_ray.environments.episode import EpisodeFailed
from rlhf_ray.environments.openenv import OpenEnvEnvironment
from rlhf_ray.errors import ConfigError

SERVER = Path(__file__).with_name("openenv_server.py")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    pytest.importorskip("openenv")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, str(SERVER), str(port)])
    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and server.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def said(text: str) -> Action:
    return Action(text=text, message={"role": "assistant", "content": text}, token_ids=(1,), truncated=False)


def called(*arguments: object, truncated: bool = False) -> Action:
    calls = [
        {"id": str(index), "type": "function", "function": {"name": "guess", "arguments": item}}
        for index, item in enumerate(arguments)
    ]
    return Action(text="", message={"role": "assistant", "tool_calls": calls}, token_ids=(1,), truncated=truncated)


def play(
    environment: OpenEnvEnvironment, *actions: Action, row: Mapping[str, Any] | None = None, seed: int = 0
) -> tuple[object, list[Step]]:
    async def episode() -> tuple[object, list[Step]]:
        try:
            prompt = await environment.reset(row or {}, seed)
            return prompt, [await environment.step(action) for action in actions]
        finally:
            await environment.close()

    return asyncio.run(asyncio.wait_for(episode(), 60))


def test_text_is_the_action_and_a_field_the_observation(url: str) -> None:
    environment = OpenEnvEnvironment(url, action_field="number", observation_field="text", columns=["number"])
    prompt, steps = play(environment, said("3"), said("6"), said("4"), row={"number": 4})

    assert prompt == "Guess a number from 1 to 7:"
    assert [step.observation for step in steps] == ["higher", "lower", None]
    assert [step.reward for step in steps] == [-0.1, -0.1, 1.0]
    assert [step.done for step in steps] == [False, False, True]


def test_a_tool_call_is_the_action_and_all_fields_the_observation(url: str) -> None:
    environment = OpenEnvEnvironment(url, columns=["number"])
    prompt, (step,) = play(environment, called('{"number": 3}'), row={"number": 4})

    assert json.loads(str(prompt)) == {"text": "Guess a number from 1 to 7:", "tries": 0}
    (message,) = step.observation  # type: ignore[misc]
    assert message["role"] == "tool"
    assert message["tool_call_id"] == "0"
    assert json.loads(message["content"]) == {"text": "higher", "tries": 1}


def test_classes_of_the_environment(url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "guess_client.py"
    path.write_text(
        "from openenv.core.env_client import EnvClient\n"
        "from openenv.core.client_types import StepResult\n"
        "from openenv.core.env_server import Action, Observation\n"
        "class Guess(Action):\n    number: int\n"
        "class Hint(Observation):\n    text: str = ''\n    tries: int = 0\n"
        "class GuessClient(EnvClient):\n"
        "    def _step_payload(self, action):\n        return {'number': action.number}\n"
        "    def _parse_result(self, payload):\n"
        "        return StepResult(Hint(**payload['observation']), payload.get('reward'), payload.get('done', False))\n"
        "    def _parse_state(self, payload):\n        return payload\n"
    )
    environment = OpenEnvEnvironment(
        url,
        client=f"{path}:GuessClient",
        action=f"{path}:Guess",
        action_field="number",
        columns=["number"],
        prompt_from_reset=False,
    )
    prompt, (wrong, right) = play(environment, said("four"), said("4"), row={"number": 4})

    assert prompt is None
    assert str(wrong.observation).startswith("error: 1 validation error for Guess")
    assert wrong.metrics == {"bad_actions": 1.0}
    assert not wrong.done
    assert right.done


def test_episodes_of_a_seed_are_alike_and_run_at_once(url: str) -> None:
    async def episode(seed: int) -> list[object]:
        environment = OpenEnvEnvironment(url, action_field="number", observation_field="text")
        await environment.reset({}, seed)
        seen = [(await environment.step(said("4"))).observation for _ in range(2)]
        await environment.close()
        return seen

    async def several(*seeds: int) -> list[list[object]]:
        return await asyncio.gather(*map(episode, seeds))

    # Seeds of 64 bits too; of eight seeds, some numbers are above and some below 4.
    big = 2**63 + 5
    one, same, *others = asyncio.run(several(big, big, 0, 1, 2, 3, 4, 5))
    assert one == same
    assert {"higher", "lower"} <= {str(seen[0]) for seen in (one, *others)}


@pytest.mark.parametrize(
    "action, text",
    [
        (said("four"), "error: .*VALIDATION_ERROR"),
        (called('{"number": '), "error: the arguments are no JSON"),
        (called("[4]"), "error: the arguments must be a JSON object"),
        (called('{"number": 1}', '{"number": 2}'), "error: one tool call at a time"),
        (called({"guess": 4}), "error: .*VALIDATION_ERROR"),
    ],
)
def test_an_action_that_does_not_fit_is_answered_with_a_text(url: str, action: Action, text: str) -> None:
    import re

    environment = OpenEnvEnvironment(url, action_field="number", columns=["number"])
    _, (wrong, right) = play(environment, action, called({"number": 4}), row={"number": 4})

    answers = [wrong.observation] if isinstance(wrong.observation, str) else wrong.observation
    assert answers
    for answer in answers:
        assert re.match(text, answer if isinstance(answer, str) else answer["content"])
    assert wrong.reward == 0.0
    assert right.done


def test_turns_must_be_tool_calls_without_an_action_field(url: str) -> None:
    _, (step,) = play(OpenEnvEnvironment(url), said("4"))

    assert step.observation == "error: the answer must be a tool call"


def test_a_truncated_call_is_not_sent(url: str) -> None:
    _, (step,) = play(
        OpenEnvEnvironment(url, columns=["number"]), called({"number": 4}, truncated=True), row={"number": 4}
    )

    assert step == Step(truncated=True)


@pytest.mark.parametrize(
    "options, row, action, message",
    [
        ({"columns": ["number"]}, {}, "1", "environment.columns names 'number', not in the row"),
        ({"observation_field": "hint"}, {}, "1", "no environment.observation_field 'hint' but .*text, tries"),
        ({"columns": ["number"]}, {"number": 0}, "1", "done before its first turn"),
        ({}, {}, "99", "99 is broken"),
    ],
)
def test_failed_episodes(url: str, options: dict[str, Any], row: dict[str, Any], action: str, message: str) -> None:
    with pytest.raises(EpisodeFailed, match=message):
        play(OpenEnvEnvironment(url, action_field="number", **options), said(action), row=row)


def test_a_server_that_does_not_answer_fails_the_episode() -> None:
    pytest.importorskip("openenv")

    with pytest.raises(EpisodeFailed, match=r"http://127.0.0.1:9: ConnectionError") as caught:
        play(OpenEnvEnvironment("http://127.0.0.1:9", timeout_s=5))
    assert caught.value.kind == "raised"


class Client:
    pass


@pytest.mark.parametrize(
    "options, field",
    [
        ({"base_url": "localhost:8000"}, "environment.base_url"),
        ({"client": "no_such_module:Client"}, "environment.client"),
        ({"action": 3}, "environment.action"),
        ({"timeout_s": 0}, "environment.timeout_s"),
        ({"timeout_s": float("nan")}, "environment.timeout_s"),
        ({"columns": "number"}, "environment.columns"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        OpenEnvEnvironment(**{"base_url": "http://localhost:8000", "client": Client, **options})

    assert caught.value.field == field


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "openenv"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])

    with pytest.raises(ConfigError, match=r"pip install 'rlhf-ray\[openenv\]'"):
        OpenEnvEnvironment("http://localhost:8000")
