from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from environments.games import Echo, Guess

from rlhf_ray.environments.dialogue import ChatFormat
from rlhf_ray.environments.environment import Action, Environment, Step
from rlhf_ray.environments.episode import EpisodeFailed, Reply, Sampled, Start
from rlhf_ray.environments.play import EnvironmentEpisode, Language
from rlhf_ray.quickstart.tokenizer import EOS_TOKEN_ID, build_tokenizer
from rlhf_ray.types import Prompt, PromptText

TOKENIZER = build_tokenizer(max_length=2048)
LANGUAGE = Language(tokenizer=TOKENIZER, chat=ChatFormat(TOKENIZER))
EXECUTOR = ThreadPoolExecutor(4)


def start_of(text: PromptText = "a number", seed: int = 3, **columns: Any) -> Start:
    ids = TOKENIZER(text)["input_ids"] if isinstance(text, str) else LANGUAGE.chat.prompt_ids(text)
    prompt = Prompt(prompt_id=1, token_ids=np.asarray(ids, dtype=np.int32), text=text, columns=columns)
    return Start(prompt=prompt, seed=seed, environment="game")


def sampled_of(text: str, number: int = 0, *, end: bool = True, **more: Any) -> Sampled:
    ids = [*text.encode(), *([EOS_TOKEN_ID] if end else [])]
    return Sampled(
        number=number,
        token_ids=np.asarray(ids, dtype=np.int32),
        logprobs=np.zeros(len(ids), dtype=np.float32),
        finish_reason="stop" if end else "length",
        **more,
    )


def episode_of(make: Any, start: Start | None = None) -> EnvironmentEpisode:
    return EnvironmentEpisode("game", make, start or start_of(), LANGUAGE, EXECUTOR)


def play(make: Any, *texts: str, start: Start | None = None, **more: Any) -> list[Reply]:
    async def run() -> list[Reply]:
        episode = episode_of(make, start)
        replies = [await episode.begin()]
        for number, text in enumerate(texts):
            replies.append(await episode.step(sampled_of(text, number, **more)))
        await episode.close()
        return replies

    return asyncio.run(run())


def failure_of(make: Any, *texts: str, start: Start | None = None) -> EpisodeFailed:
    with pytest.raises(EpisodeFailed) as failure:
        play(make, *texts, start=start)
    return failure.value


def text_of(reply: Reply) -> str:
    return str(TOKENIZER.decode(reply.requests[0].token_ids.tolist()))


def test_a_text_game_from_its_prompt_to_its_end() -> None:
    begun, wrong, right = play(Guess, "9", "2")
    assert text_of(begun) == begun.requests[0].text == "a number 1-7:"
    assert text_of(wrong) == "no "
    assert wrong.reward == -0.1
    assert wrong.metrics == {"distance": 7.0}
    assert wrong.requests[0].sequence == 0
    assert wrong.requests[0].number == 1
    assert wrong.message is None
    assert right.finish_reason == "stop"
    assert right.reward == 1.0
    assert right.requests == ()


def test_the_prompt_of_a_row_is_kept_token_for_token() -> None:
    start = start_of("odd \ud7ff text")
    (begun,) = play(Echo, start=start)
    assert begun.requests[0].token_ids.tolist() == start.prompt.token_ids.tolist()


def test_a_chat_is_continued_by_messages_of_the_user() -> None:
    start = start_of([{"role": "user", "content": "say it"}])
    begun, reply = play(Echo, "hello", start=start)
    assert text_of(begun) == "user: say it\nassistant: "
    assert begun.requests[0].messages == ({"role": "user", "content": "say it"},)
    assert begun.requests[0].text is None
    assert text_of(reply) == "\nuser: <hello1>\nassistant: ", "the end of the turn was sampled"
    assert reply.message == {"role": "assistant", "content": "hello"}
    assert reply.requests[0].messages == ({"role": "user", "content": "<hello1>"},)


def test_a_turn_that_was_cut_is_ended_by_the_observation() -> None:
    seen: list[Action] = []

    class Watching(Echo):
        def step(self, action: Action) -> Step:
            seen.append(action)
            return super().step(action)

    _, reply = play(Watching, "hel", start=start_of([{"role": "user", "content": "say it"}]), end=False)
    assert reply.requests[0].token_ids[0] == EOS_TOKEN_ID
    assert seen[0].truncated
    assert seen[0].text == "hel"
    assert seen[0].token_ids == tuple(b"hel")


def test_the_message_is_the_one_that_the_engine_parsed() -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    message = {"role": "assistant", "content": "", "tool_calls": calls}
    seen: list[Action] = []

    class Watching(Echo):
        def step(self, action: Action) -> Step:
            seen.append(action)
            action.message["tool_calls"].clear()  # Its own copy.
            return Step(done=True)

    _, reply = play(Watching, "f()", start=start_of([{"role": "user", "content": "?"}]), message=message)
    assert reply.message == message
    assert reply.message is not None
    assert reply.message["tool_calls"] == calls


def test_what_an_environment_edits_is_its_own() -> None:
    class Editing(Echo):
        def reset(self, row: Mapping[str, Any], seed: int) -> None:
            row["items"].append(9)

    start = start_of(items=[1])
    play(Editing, start=start)
    assert start.prompt.columns["items"] == [1]


def test_async_environments_play_too() -> None:
    class Waiting:
        async def reset(self, row: Mapping[str, Any], seed: int) -> str:
            await asyncio.sleep(0)
            return "go"

        async def step(self, action: Action) -> Step:
            await asyncio.sleep(0)
            return Step(observation="on", truncated=action.text == "b")

    begun, first, second = play(Waiting, "a", "b")
    assert (text_of(begun), text_of(first), second.finish_reason) == ("go", "on", "environment")


def test_without_an_observation_the_policy_continues() -> None:
    class Silent(Echo):
        def step(self, action: Action) -> Step:
            return Step()

    for start in (start_of(), start_of([{"role": "user", "content": "?"}])):
        _, reply = play(Silent, "a", start=start, end=False)
        assert reply.requests[0].token_ids.tolist() == []


@pytest.mark.parametrize(
    ("step", "kind", "message"),
    [
        (None, "wrong_type", "step returned NoneType; return rlhf_ray.Step"),
        (("obs", 1.0, True), "wrong_type", "step returned tuple"),
        (Step(reward="1"), "wrong_type", "the reward '1', not a number"),  # type: ignore[arg-type]
        (Step(reward=math.nan), "not_finite", "the reward nan"),
        (Step(reward=math.inf, done=True), "not_finite", "the reward inf"),
        (Step(observation=3), "wrong_type", "the observation 3; give a text, or messages"),  # type: ignore[arg-type]
        (Step(observation=[{"content": "x"}]), "wrong_type", "give a text, or messages with role and content"),
        (Step(observation=[{"role": "user", "content": "x"}]), "wrong_type", "the prompt is a text"),
        (Step(observation="\ud800"), "raised", "lone surrogate"),
    ],
)
def test_answers_that_cannot_be_used(step: Any, kind: str, message: str) -> None:
    class Wrong(Echo):
        def step(self, action: Action) -> Step:
            answer: Step = step
            return answer

    failure = failure_of(Wrong, "a")
    assert failure.kind == kind
    assert message in failure.message
    assert failure.message.startswith("game: ")


@pytest.mark.parametrize(("text", "error"), [("raise", "KeyError: 'raise'"), ("exit", "SystemExit: 3")])
def test_an_environment_that_raises_names_the_line(text: str, error: str) -> None:
    failure = failure_of(Echo, text)
    assert failure.kind == "raised"
    assert f"game: step raised {error}" in failure.message
    assert "games.py:" in failure.message


def test_reset_may_raise_and_so_may_the_class() -> None:
    assert "reset raised ValueError: no such level" in failure_of(Echo, start=start_of(reset="raise")).message
    assert "__init__ raised TypeError" in failure_of(lambda: Guess(1, 2)).message  # type: ignore[call-arg]


def test_an_empty_prompt_is_refused() -> None:
    class Empty(Echo):
        def reset(self, row: Mapping[str, Any], seed: int) -> str:  # type: ignore[override]
            return ""

    assert "a prompt needs a token" in failure_of(Empty).message


def test_an_environment_is_closed_however_it_ended() -> None:
    closed: list[str] = []

    class Closing(Environment):
        def reset(self, row: Mapping[str, Any], seed: int) -> None:
            return None

        def close(self) -> None:
            closed.append("yes")

    play(Closing)
    assert closed == ["yes"]
    asyncio.run(episode_of(Closing).close())
    assert closed == ["yes"], "one that never began has nothing to close"
