from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import logging
import math
import os
import random
import re
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from environments.agent_driver import Driver, call_of, chat_format, play, start_of

from rlhf_ray.environments import openai_api
from rlhf_ray.environments.agent import AgentEpisode
from rlhf_ray.environments.agent_server import AgentServer
from rlhf_ray.environments.episode import EpisodeFailed, Reply, Sampled
from rlhf_ray.errors import ConfigError

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}


async def ask(client: Any, *messages: Any, **fields: Any) -> Any:
    """One completion; texts are messages of the user and the assistant by turns."""
    roles = ("user", "assistant")
    made = [m if isinstance(m, dict) else {"role": roles[i % 2], "content": m} for i, m in enumerate(messages)]
    return await client.chat.completions.create(model="policy", messages=made, **fields)


async def say(client: Any, *messages: Any, **fields: Any) -> str:
    return str((await ask(client, *messages, **fields)).choices[0].message.content)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


def failure_of(agent: Any, **options: Any) -> EpisodeFailed:
    with pytest.raises(EpisodeFailed) as caught:
        run(play(agent, **options))
    return caught.value


# --- turns ------------------------------------------------------------------------------------------------------------


async def two_turns(row: Any, client: Any) -> float:
    first = await say(client, row["prompt"])
    second = await say(client, row["prompt"], first, "And doubled?")
    return 1.0 if (first, second) == ("4", "8") else 0.0


def test_second_turn_appends_to_what_was_sampled():
    driver = run(play(two_turns, lambda request, text: "8" if "doubled" in text else "4"))
    assert (driver.end.finish_reason, driver.end.final_reward) == ("stop", 1.0)
    assert [(r.number, r.sequence) for r in driver.requests] == [(0, 0), (1, 0)]
    assert driver.text(0).endswith(
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
        "<|im_start|>user\nAnd doubled?<|im_end|>\n<|im_start|>assistant\n8<|im_end|>"
    )
    assert driver.requests[0].token_ids.tolist() == chat_format().prompt_ids([{"role": "user", "content": "2+2?"}])
    assert driver.requests[1].messages == ({"role": "user", "content": "And doubled?"},)
    assert driver.requests[1].token_ids.dtype == np.int32
    assert [reply.message["content"] for reply in driver.replies[1:]] == ["4", "8"]


def test_sync_agent_plays_the_same_episode():
    def solve(row, client):
        first = client.chat.completions.create(model="x", messages=[{"role": "user", "content": row["prompt"]}])
        assert threading.current_thread() is not threading.main_thread()
        text = first.choices[0].message.content
        history = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": text}]
        more = [*history, {"role": "user", "content": "And doubled?"}]
        second = client.chat.completions.create(model="x", messages=more).choices[0].message.content
        return (text, second) == ("4", "8")

    policy = lambda request, text: "8" if "doubled" in text else "4"  # noqa: E731
    mine, other = run(play(solve, policy)), run(play(two_turns, policy))
    assert mine.tokens == other.tokens
    assert mine.end.final_reward == 1.0


def test_compacted_history_begins_another_sequence():
    async def solve(row, client):
        first = await say(client, "a long story")
        await say(client, f"Summary: {first}. Go on.")
        await say(client, "a long story", first, "Continue.")
        return 0.5

    driver = run(play(solve))
    assert [r.sequence for r in driver.requests] == [0, 1, 0]
    assert driver.text(1).count("<|im_start|>user\n") == 1
    assert "<|im_start|>user\nSummary: 4. Go on.<|im_end|>" in driver.text(1)


def test_request_with_other_tools_begins_another_sequence():
    async def solve(row, client):
        first = await say(client, "hi", tools=[ADD])
        await say(client, "hi", first, "and now?", tools=[ADD], tool_choice="none")
        await say(client, "hi", first, "and now?", tools=[ADD])
        return 0

    driver = run(play(solve, parses_tools=True))
    assert [r.sequence for r in driver.requests] == [0, 1, 0]
    assert '"name": "add"' in driver.text(0)
    assert '"name": "add"' not in driver.text(1)


def test_fork_continues_the_longest_conversation_and_forks_while_one_is_pending():
    async def solve(row, client):
        first = await say(client, "hi")
        await asyncio.gather(say(client, "hi", first, "b"), say(client, "hi", first, "a"))
        return 0

    driver = run(play(solve))
    # "a" comes first by its prompt, though it was asked last.
    assert [(r.sequence, r.messages[-1]["content"]) for r in driver.requests] == [(0, "hi"), (0, "a"), (1, "b")]
    assert len(driver.requests[2].messages) == 3


@pytest.mark.parametrize("seed", range(3))
def test_parallel_requests_are_numbered_by_prompt(seed):
    names = [f"question {i:02d}" for i in range(20)]
    shuffled = random.Random(seed).sample(names, len(names))

    async def solve(row, client):
        answers = await asyncio.gather(*(say(client, name) for name in shuffled))
        return float(answers == [f"re: {name}" for name in shuffled])

    driver = run(play(solve, lambda request, text: "re: " + re.findall(r"question \d\d", text)[-1]))
    assert [len(reply.requests) for reply in driver.replies] == [20] + [0] * 20
    assert [r.messages[0]["content"] for r in driver.requests] == names
    assert driver.end.final_reward == 1.0


def test_identical_parallel_requests_get_sequences_of_their_own():
    async def solve(row, client):
        return float(len(set(await asyncio.gather(*(say(client, "hi") for _ in range(4))))))

    driver = run(play(solve, lambda request, text: f"answer {request.number}"))
    assert driver.end.final_reward == 4.0
    assert sorted(driver.tokens) == [0, 1, 2, 3]


def test_200_conversations_at_once_get_their_own_tokens():
    turns = 3

    async def converse(client: Any, who: int) -> None:
        messages: list[Any] = [{"role": "user", "content": f"I am {who}."}]
        for turn in range(turns):
            await asyncio.sleep(random.random() * 0.01)
            text = await say(client, *messages)
            assert text == f"hello {who}, turn {turn}", (who, turn, text)
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": f"{who} again"}]

    async def solve(row, client):
        await asyncio.gather(*(converse(client, who) for who in range(200)))
        return 1.0

    def policy(request: Any, text: str) -> str:
        who = re.search(r"I am (\d+)\.", text)[1]
        assert set(re.findall(r"(\d+) again|hello (\d+)", text)) <= {(who, ""), ("", who)}
        return f"hello {who}, turn {text.count('again')}"

    async def main() -> Driver:
        driver = Driver(AgentEpisode(solve, start_of(), chat_format()), policy, delay=lambda: random.random() * 0.05)
        await driver.play()
        return driver

    driver = run(main())
    assert driver.end.final_reward == 1.0
    assert len(driver.requests) == 200 * turns
    assert len(driver.tokens) == 200
    for sequence in driver.tokens:
        text = driver.text(sequence)
        who = re.search(r"I am (\d+)\.", text)[1]
        assert re.findall(r"hello (\d+), turn (\d)", text) == [(who, str(turn)) for turn in range(turns)]


def test_many_episodes_of_one_agent_stay_apart():
    async def solve(row, client):
        first = await say(client, row["prompt"])
        return float(await say(client, row["prompt"], first, "again") == f"2 {row['prompt']}")

    def policy(request: Any, text: str) -> str:
        who = re.search(r"user\n(\d+)<", text)[1]
        return f"{2 if 'again' in text else 1} {who}"

    async def main() -> list[float]:
        episodes = [AgentEpisode(solve, start_of(str(i)), chat_format()) for i in range(100)]
        ends = await asyncio.gather(*(Driver(e, policy, delay=random.random).play() for e in episodes))
        return [end.final_reward for end in ends]

    assert run(main()) == [1.0] * 100


# --- idleness ---------------------------------------------------------------------------------------------------------


async def sampled_for(reply: Reply, index: int = 0, text: str = "4") -> Sampled:
    ids = chat_format().tokenizer.encode(f"{text}<|im_end|>")
    return Sampled(number=reply.requests[index].number, token_ids=np.asarray(ids, np.int32), finish_reason="stop")


def test_step_waits_for_a_slow_tool():
    async def solve(row, client):
        first = await say(client, "hi")
        await asyncio.sleep(0.2)
        return len(await say(client, "hi", first, "go on"))

    async def main() -> None:
        episode = AgentEpisode(solve, start_of(), chat_format(), idle_s=0.01)
        reply = await episode.step(await sampled_for(await episode.begin()))
        assert len(reply.requests) == 1
        assert reply.step_s >= 0.2
        assert (await episode.step(await sampled_for(reply))).final_reward == 1.0
        await episode.close()

    run(main())


def test_step_is_empty_while_others_are_pending_and_later_requests_are_not_lost():
    async def slow(client: Any) -> str:
        await say(client, "a")
        await asyncio.sleep(0.1)
        return await say(client, "a", "4", "more")

    async def solve(row, client):
        await asyncio.gather(slow(client), say(client, "b"))
        return 1

    async def main() -> None:
        episode = AgentEpisode(solve, start_of(), chat_format(), idle_s=0.02)
        begun = await episode.begin()
        assert len(begun.requests) == 2
        empty = await episode.step(await sampled_for(begun, 0))
        assert (empty.requests, empty.finish_reason) == ((), None)
        assert empty.message == {"role": "assistant", "content": "4"}
        await asyncio.sleep(0.15)
        late = await episode.step(await sampled_for(begun, 1))
        assert [r.messages[-1]["content"] for r in late.requests] == ["more"]
        assert (await episode.step(await sampled_for(late))).finish_reason == "stop"
        await episode.close()

    run(main())


def test_later_step_takes_over_from_one_that_waits():
    async def solve(row, client):
        await asyncio.gather(say(client, "a"), say(client, "b"))
        await asyncio.sleep(0.05)
        return 1

    async def main() -> None:
        episode = AgentEpisode(solve, start_of(), chat_format(), idle_s=60)
        begun = await episode.begin()
        steps = [asyncio.create_task(episode.step(await sampled_for(begun, i))) for i in range(2)]
        replies = await asyncio.wait_for(asyncio.gather(*steps), 10)
        assert [reply.finish_reason for reply in replies] == [None, "stop"]
        await episode.close()

    run(main())


def test_answer_that_the_agent_no_longer_waits_for():
    async def solve(row, client):
        with pytest.raises((asyncio.TimeoutError, TimeoutError)):
            await asyncio.wait_for(say(client, "slow"), 0.05)
        return float(await say(client, "fast") == "4")

    async def main() -> None:
        episode = AgentEpisode(solve, start_of(), chat_format())
        begun = await episode.begin()
        await asyncio.sleep(0.1)
        reply = await episode.step(await sampled_for(begun))
        assert [r.messages[0]["content"] for r in reply.requests] == ["fast"]
        assert (await episode.step(await sampled_for(reply))).final_reward == 1.0
        await episode.close()

    run(main())


def test_unknown_request_is_an_error():
    async def main() -> None:
        episode = AgentEpisode(two_turns, start_of(), chat_format())
        sampled = await sampled_for(await episode.begin())
        await episode.step(sampled)
        with pytest.raises(ValueError, match="request 0 is not pending"):
            await episode.step(sampled)
        await episode.close()

    run(main())


# --- the API ----------------------------------------------------------------------------------------------------------


def probe(body: Callable[[Any], Coroutine[Any, Any, Any]], policy: Any = lambda r, t: "4", **options: Any) -> Any:
    """What ``body`` returns, given a client, in an episode."""
    found: list[Any] = []

    async def solve(row, client):
        found.append(await body(client))
        return 1

    driver = run(play(solve, policy, **options))
    return found[0], driver


def test_completion_has_usage_and_names():
    (first, second), driver = probe(lambda c: _two(c))
    assert first.choices[0].finish_reason == "stop"
    assert first.usage.prompt_tokens == len(driver.requests[0].token_ids)
    assert first.usage.completion_tokens == 2
    assert first.usage.total_tokens == first.usage.prompt_tokens + 2
    assert second.usage.prompt_tokens == len(driver.tokens[0]) - 2
    assert first.id != second.id
    assert first.model == "policy"


async def _two(client: Any) -> tuple[Any, Any]:
    return await ask(client, "hi"), await ask(client, "hi", "4", "again")


def test_tool_calls_reach_the_agent_and_their_results_the_policy():
    async def body(client: Any) -> Any:
        first = (await ask(client, "1+1?", tools=[ADD])).choices[0]
        assert first.finish_reason == "tool_calls"
        assert first.message.content is None
        call = first.message.tool_calls[0]
        result = {"role": "tool", "tool_call_id": call.id, "content": "two"}
        echoed = first.message.model_dump()
        second = await ask(client, {"role": "user", "content": "1+1?"}, echoed, result, tools=[ADD])
        return call, second.choices[0].finish_reason

    policy = lambda r, t: "It is two." if "two" in t else call_of("add", call_id=None, a=1)  # noqa: E731
    (call, reason), driver = probe(body, policy, parses_tools=True)
    assert (call.function.name, json.loads(call.function.arguments), call.id) == ("add", {"a": 1}, "call_0_0")
    assert reason == "stop"
    assert [r.sequence for r in driver.requests] == [0, 0]
    assert driver.text(0).count("It is two.") == 1
    assert "<tool_response>\ntwo\n</tool_response>" in driver.text(0)


def test_call_that_was_cut_is_not_executed():
    async def solve(row, client):
        choice = (await ask(client, "1+1?", tools=[ADD])).choices[0]
        assert json.loads(choice.message.content)[0]["function"]["name"] == "add", "what was written is text"
        return float(choice.finish_reason == "length" and choice.message.tool_calls is None)

    async def main() -> Reply:
        episode = AgentEpisode(solve, start_of(), chat_format(), parses_tools=True)
        driver = Driver(episode, lambda r, t: call_of("add", a=1))
        driver.finish_reason = "length"
        return await driver.play()

    assert run(main()).final_reward == 1.0


def test_calls_without_tools_stay_text():
    text, _ = probe(lambda c: say(c, "hi"), lambda r, t: call_of("add", a=1), parses_tools=True)
    assert json.loads(text)[0]["function"]["name"] == "add"


def test_reasoning_is_where_vllm_has_it():
    answer = {"role": "assistant", "content": "4", "reasoning": "two and two"}
    completion, _ = probe(lambda c: ask(c, "hi"), lambda r, t: answer)
    assert completion.choices[0].message.reasoning_content == "two and two"
    assert completion.choices[0].message.content == "4"


def test_stream_has_text_and_usage():
    async def body(client: Any) -> list[Any]:
        return [chunk async for chunk in await ask(client, "hi", stream=True, stream_options={"include_usage": True})]

    chunks, _ = probe(body)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "4"
    assert [c.choices[0].finish_reason for c in chunks if c.choices] == [None, None, "stop"]
    assert chunks[-1].usage.completion_tokens == 2
    assert len({c.id for c in chunks}) == 1


def test_stream_has_tool_calls():
    async def body(client: Any) -> Any:
        messages = [{"role": "user", "content": "hi"}]
        async with client.chat.completions.stream(model="policy", messages=messages, tools=[ADD]) as stream:
            return await stream.get_final_completion()

    completion, _ = probe(body, lambda r, t: call_of("add", a=5), parses_tools=True)
    call = completion.choices[0].message.tool_calls[0]
    assert (call.id, call.function.name, call.function.arguments) == ("c1", "add", '{"a": 5}')
    assert completion.choices[0].finish_reason == "tool_calls"


def test_logprobs_are_those_of_sampled_tokens():
    completion, _ = probe(lambda c: ask(c, "hi", logprobs=True), lambda r, t: "ab")
    content = completion.choices[0].logprobs.content
    assert [(one.token, one.logprob) for one in content] == [("a", 0.0), ("b", -0.5), ("<|im_end|>", -1.0)]
    assert content[0].bytes == [97]
    without, _ = probe(lambda c: ask(c, "hi"))
    assert without.choices[0].logprobs is None


def test_stop_and_max_tokens_reach_the_driver_and_stop_texts_are_left_out():
    text, driver = probe(lambda c: say(c, "hi", stop=["END", "\n"], max_tokens=9), lambda r, t: "one END\ntwo")
    assert text == "one "
    assert (driver.requests[0].stop, driver.requests[0].max_tokens) == (("END", "\n"), 9)
    _, driver = probe(lambda c: say(c, "hi", stop="x", max_tokens=9, max_completion_tokens=5))
    assert (driver.requests[0].stop, driver.requests[0].max_tokens) == (("x",), 5)


def test_text_parts_are_joined_and_developers_are_the_system():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    _, driver = probe(lambda c: say(c, *messages))
    assert [(m["role"], m["content"]) for m in driver.requests[0].messages] == [
        ("system", "Be brief."),
        ("user", "one\ntwo"),
    ]


@pytest.mark.parametrize(
    ("fields", "param", "remedy"),
    [
        ({"n": 2}, "n", "several requests"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", "ask for the format"),
        ({"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "add"}}}, "tool_choice", "decides"),
        ({"logit_bias": {"1": 5}}, "logit_bias", "own distribution"),
        ({"logprobs": True, "top_logprobs": 2}, "top_logprobs", "own log-probability"),
        ({"presence_penalty": 0.5}, "presence_penalty", "own distribution"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction", "leave it out"),
        ({"modalities": ["text", "audio"]}, "modalities", "only text"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls", "several tools"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "chat_template_kwargs"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools", "type 'function'"),
        ({"max_tokens": 0}, "max_tokens", "positive integer"),
        ({"max_completion_tokens": -1}, "max_completion_tokens", "positive integer"),
        ({"stop": ["a", ""]}, "stop", "none of them empty"),
        ({"extra_body": {"top_k": 5}}, "top_k", "leave it out"),
    ],
)
def test_unsupported_field_is_refused_by_name(fields, param, remedy):
    async def body(client: Any) -> Any:
        with pytest.raises(openai.BadRequestError) as caught:
            await ask(client, "hi", **fields)
        await ask(client, "hi")
        return caught.value

    error, _ = probe(body, parses_tools=True)
    assert error.status_code == 400
    assert error.param == param
    assert param in error.message
    assert remedy in error.message


def test_defaults_that_clients_spell_out_are_accepted():
    fields = {
        "n": 1,
        "response_format": {"type": "text"},
        "tool_choice": "auto",
        "frequency_penalty": 0,
        "parallel_tool_calls": True,
        "store": False,
        "user": "me",
    }
    text, _ = probe(lambda c: say(c, "hi", **fields))
    assert text == "4"


def test_tools_are_refused_without_a_parser():
    async def body(client: Any) -> Any:
        with pytest.raises(openai.BadRequestError, match=r"environment\.tool_parser") as caught:
            await ask(client, "hi", tools=[ADD])
        await ask(client, "hi")
        return caught.value

    assert probe(body)[0].param == "tools"


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "'image_url'"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "'input_audio'"),
        ({"role": "user", "content": 5}, "'int'"),
        ({"role": "poet", "content": "x"}, "poet"),
        ({"role": "assistant", "tool_calls": [{"id": "x"}]}, "list of calls"),
        ({"role": "user", "content": "\ud800"}, "surrogate"),
    ],
)
def test_bad_message_is_refused(message, words):
    async def main() -> openai_api.Answer:
        episode = AgentEpisode(two_turns, start_of(), chat_format())
        await episode.begin()
        try:
            body = json.dumps({"messages": [message]}).encode()
            answering = asyncio.create_task(episode.answer("POST", "/chat/completions", body))
            await asyncio.sleep(0.01)
            if not answering.done():
                # Tokens are made where requests are given to the driver.
                await episode.step(Sampled(number=0, token_ids=np.array([52], np.int32), finish_reason="stop"))
            return await asyncio.wait_for(answering, 5)
        finally:
            await episode.close()

    answer = run(main())
    assert answer.status == 400
    assert words in json.loads(answer.body)["error"]["message"]


@pytest.mark.parametrize("body", [b"{", b"[]", b"{}", b'{"messages": []}', b'{"messages": "hi"}', b'{"stream": 1}'])
def test_request_that_is_none_is_refused(body):
    with pytest.raises(openai_api.Refused):
        openai_api.parse_call(body, openai_api.Offer())


def test_other_endpoints_are_refused_by_name():
    async def body(client: Any) -> Any:
        with pytest.raises(openai.NotFoundError, match="OpenAIChatCompletionsModel"):
            await client.responses.create(model="policy", input="hi")
        with pytest.raises(openai.NotFoundError, match="POST /embeddings is not supported"):
            await client.embeddings.create(model="policy", input="hi")
        await ask(client, "hi")
        return [model.id async for model in client.models.list()]

    assert probe(body, model_name="mine")[0] == ["mine"]


def test_sampling_settings_that_differ_are_logged_once(caplog):
    openai_api._log_ignored.cache_clear()

    async def body(client: Any) -> None:
        for _ in range(2):
            await ask(client, "hi", temperature=0.1, top_p=0.9, seed=5)

    with caplog.at_level(logging.INFO, "rlhf_ray"):
        probe(lambda c: ask(c, "hi", temperature=1.0, top_p=1.0))
        assert caplog.messages == []
        probe(body)
    assert [re.search(r"sets (\w+)", m)[1] for m in caplog.messages] == ["temperature", "top_p", "seed"]


def test_demands_on_the_form_are_logged_once_and_left_to_the_policy(caplog):
    openai_api._log_ignored.cache_clear()

    async def body(client: Any) -> list[Any]:
        fields = {"tools": [ADD], "tool_choice": "required", "response_format": {"type": "json_object"}}
        return [(await ask(client, "hi", **fields)).choices[0] for _ in range(2)]

    with caplog.at_level(logging.INFO, "rlhf_ray"):
        choices, driver = probe(body, parses_tools=True)
    assert [choice.message.content for choice in choices] == ["4", "4"]
    assert '"name": "add"' in driver.text(0)
    assert sorted(re.search(r"sets (\w+)", m)[1] for m in caplog.messages) == ["response_format", "tool_choice"]


def test_messages_that_the_template_refuses_are_an_error_of_the_request():
    from environments.chat_templates import GEMMA_2, byte_tokenizer

    from rlhf_ray.environments.dialogue import ChatFormat

    async def solve(row, client):
        with pytest.raises(openai.BadRequestError, match="refused the prompt"):
            await ask(client, {"role": "system", "content": "x"}, {"role": "user", "content": "y"})
        return 1

    with pytest.raises(EpisodeFailed, match="never calls the model"):
        run(AgentEpisode(solve, start_of(), ChatFormat(byte_tokenizer(GEMMA_2))).begin())


# --- limits -----------------------------------------------------------------------------------------------------------


def cut_after(agent: Any, turns: int, reason: str, **options: Any) -> Reply:
    async def main() -> Reply:
        driver = Driver(AgentEpisode(agent, start_of(), chat_format(), **options), lambda r, t: "4")
        driver.max_turns, driver.cut_reason = turns, reason
        return await asyncio.wait_for(driver.play(), 20)

    return run(main())


@pytest.mark.parametrize(("reason", "code"), [("turns", "max_turns"), ("length", "context_length_exceeded")])
def test_agent_may_catch_a_limit_and_return_its_reward(reason, code):
    async def solve(row, client):
        first = await say(client, "hi")
        with pytest.raises(openai.BadRequestError) as caught:
            await asyncio.gather(say(client, "hi", first, "a"), say(client, "hi", first, "b"))
        assert caught.value.code == code
        with pytest.raises(openai.BadRequestError):
            await say(client, "one more")
        return 0.25

    assert cut_after(solve, 1, reason).final_reward == 0.25


async def endless(row: Any, client: Any) -> float:
    messages = ["hi"]
    while True:
        messages += [await say(client, *messages), "more"]


async def wrapping(row: Any, client: Any) -> float:
    try:
        return await endless(row, client)
    except openai.OpenAIError as error:
        raise RuntimeError("the model failed") from error


async def grouping(row: Any, client: Any) -> float:
    async with asyncio.TaskGroup() as group:
        group.create_task(endless(row, client))
    return 0.0


@pytest.mark.parametrize("agent", [endless, wrapping, grouping])
def test_limit_that_the_agent_does_not_catch(agent):
    with pytest.raises(EpisodeFailed, match=r"shop: .*(raised BadRequestError|model failed)") as caught:
        cut_after(agent, 2, "turns")
    assert caught.value.kind == "limit"


def test_agent_that_asks_again_and_again_after_a_limit():
    async def solve(row, client):
        while True:
            try:
                await say(client, "hi")
            except openai.BadRequestError:
                continue

    with pytest.raises(EpisodeFailed, match="asked 100 times more after max_turns") as caught:
        cut_after(solve, 1, "turns")
    assert caught.value.kind == "limit"


def test_other_error_after_a_limit_is_the_agents_own():
    async def solve(row, client):
        try:
            return await endless(row, client)
        except openai.BadRequestError:
            pass
        return row["nothing"]

    with pytest.raises(EpisodeFailed, match="KeyError") as caught:
        cut_after(solve, 1, "length")
    assert caught.value.kind == "raised"


# --- failures ---------------------------------------------------------------------------------------------------------


def test_agent_that_never_calls_the_model():
    async def solve(row, client):
        return 1.0

    assert failure_of(solve).args == ("raised", "shop: the agent never calls the model")


def returning(value: Any) -> Any:
    async def solve(row, client):
        await say(client, "hi")
        return value

    return solve


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        (None, "wrong_type", "returned None"),
        ("1.0", "wrong_type", "returned '1.0'"),
        ([1.0], "wrong_type", r"returned \[1.0\]"),
        (np.array([1.0, 2.0]), "wrong_type", "returned ndarray"),
        (math.nan, "not_finite", "returned nan"),
        (-math.inf, "not_finite", "returned -inf"),
        (10**400, "not_finite", "returned inf"),
    ],
)
def test_reward_that_is_none(value, kind, words):
    with pytest.raises(EpisodeFailed, match=f"shop: the agent {words}; it must return the reward") as caught:
        run(play(returning(value)))
    assert caught.value.kind == kind


@pytest.mark.parametrize(("value", "reward"), [(1, 1.0), (True, 1.0), (np.float32(0.5), 0.5), (np.array(2), 2.0)])
def test_numbers_are_rewards(value, reward):
    assert run(play(returning(value))).end.final_reward == reward


def fails(*_: Any) -> None:
    raise LookupError("no such item")


def test_agent_that_raises_is_shown_with_its_own_line():
    async def solve(row, client):
        await say(client, "hi")
        json.loads("{")

    def sync_solve(row, client):
        fails()

    failure = failure_of(solve)
    assert failure.kind == "raised"
    line = solve.__code__.co_firstlineno + 2
    assert "the agent raised JSONDecodeError: Expecting" in failure.message
    assert f"({__file__}:{line} in solve)" in failure.message
    assert re.search(r"LookupError: no such item \(.*test_agent.py:\d+ in fails\)", failure_of(sync_solve).message)


def test_agent_that_exits_does_not_end_the_worker():
    async def solve(row, client):
        await say(client, "hi")
        sys.exit(3)

    failure = failure_of(solve)
    assert (failure.kind, "SystemExit: 3" in failure.message) == ("raised", True)


def test_agent_that_is_cancelled():
    async def solve(row, client):
        await say(client, "hi")
        asyncio.current_task().cancel()
        await asyncio.sleep(1)

    failure = failure_of(solve)
    assert (failure.kind, "CancelledError" in failure.message) == ("raised", True)


async def closed_early(agent: Any, **options: Any) -> AgentEpisode:
    episode = AgentEpisode(agent, start_of(), chat_format(), **options)
    await episode.begin()
    await episode.close()
    return episode


def test_close_cancels_the_agent_and_its_tasks():
    ended = []

    async def helper(client: Any) -> None:
        try:
            await say(client, "helper")
        finally:
            ended.append("helper")

    async def solve(row, client):
        task = asyncio.create_task(helper(client))
        try:
            await say(client, "hi")
        finally:
            ended.append("agent")
        return await task

    async def main() -> None:
        await closed_early(solve)
        await asyncio.sleep(0)
        assert sorted(ended) == ["agent", "helper"]

    run(main())


def test_agent_that_swallows_cancellation_once_is_cancelled_again():
    async def solve(row, client):
        try:
            await say(client, "hi")
        except asyncio.CancelledError:
            await say(client, "hi again")

    run(closed_early(solve))


def test_agent_that_never_ends_is_told_to_the_worker():
    released = threading.Event()

    async def solve(row, client):
        while not released.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await say(client, "hi")

    async def main() -> None:
        with pytest.raises(EpisodeFailed, match=r"still runs 0\.1 s after its episode") as caught:
            await closed_early(solve, close_s=0.1)
        assert caught.value.kind == "timeout"
        # The event loop cancels it once more.
        released.set()

    run(main())


def test_thread_that_waits_for_an_answer_ends_with_its_episode():
    seen: list[threading.Thread] = []

    def solve(row, client):
        seen.append(threading.current_thread())
        try:
            client.chat.completions.create(model="x", messages=[{"role": "user", "content": "hi"}])
        except Exception:  # What unwinds a thread is none.
            time.sleep(60)

    run(closed_early(solve))
    seen[0].join(5)
    assert not seen[0].is_alive()


def test_thread_that_does_not_end_is_told_to_the_worker():
    release = threading.Event()

    def solve(row, client):
        try:
            client.chat.completions.create(model="x", messages=[{"role": "user", "content": "hi"}])
        except BaseException:
            release.wait(30)

    async def main() -> None:
        with pytest.raises(EpisodeFailed, match="still runs") as caught:
            await closed_early(solve, close_s=0.1)
        assert caught.value.kind == "timeout"
        release.set()
        await asyncio.sleep(0.1)

    run(main())


def test_agents_change_copies_of_the_row():
    chat = [{"role": "user", "content": "hi"}]
    start = start_of(chat, tags=["a"])
    before = copy.deepcopy(start.prompt)

    async def solve(row, client):
        assert row == {"prompt": before.text, "tags": ["a"]}
        text = await say(client, *row["prompt"])
        row["prompt"].append({"role": "assistant", "content": text})
        row["prompt"].append({"role": "user", "content": "again"})
        row["prompt"][0]["content"] = "changed"
        row["tags"].clear()
        await say(client, *row["prompt"])
        return 1

    first, second = run(play(solve, start=start)), run(play(solve, start=start))
    assert start.prompt.text == before.text
    assert start.prompt.columns == before.columns
    assert first.tokens == second.tokens
    assert first.requests[0].messages == tuple(before.text)


# --- what an agent may be ---------------------------------------------------------------------------------------------


def test_client_may_have_any_name_and_other_arguments_have_defaults():
    async def solve(example, llm, temperature=0.5):
        return len(await say(llm, example["prompt"]))

    assert run(play(solve)).end.final_reward == 1.0


@pytest.mark.parametrize(
    "agent", [lambda row: 1, lambda row, client, budget: 1, lambda: 1, lambda row, *, budget: 1, lambda row, b, c: 1]
)
def test_function_with_other_parameters_is_refused(agent):
    with pytest.raises(ConfigError, match=r"environment\.agent = .*lambda.*write solve\(row, client\)"):
        AgentEpisode(agent, start_of(), chat_format())


@pytest.mark.parametrize("agent", [5, "python agent.py", {"command": []}, {"command": [1]}, {"cmd": "x"}, {}])
def test_what_is_no_agent_is_refused(agent):
    with pytest.raises(ConfigError, match=r"environment\.agent"):
        AgentEpisode(agent, start_of(), chat_format(), server=AgentServer())


def test_object_with_an_async_call_is_an_agent():
    class Solver:
        async def __call__(self, row, client):
            return len(await say(client, "hi"))

    assert run(play(Solver())).end.final_reward == 1.0


# --- URLs and commands ------------------------------------------------------------------------------------------------


def play_with_server(agent: Any, policy: Any = lambda r, t: "4", **options: Any) -> Driver:
    async def main() -> Driver:
        server = AgentServer()
        try:
            return await play(agent, policy, server=server, **options)
        finally:
            await server.stop()

    return run(main())


def test_agent_that_asks_for_a_url():
    async def solve(row, base_url, api_key):
        async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
            first = await say(client, "hi")
            text = ""
            async for chunk in await ask(client, "hi", first, "more", stream=True):
                text += chunk.choices[0].delta.content or ""
            with pytest.raises(openai.BadRequestError, match="n = 2"):
                await ask(client, "hi", n=2)
            return float((first, text) == ("4", "4"))

    driver = play_with_server(solve)
    assert driver.end.final_reward == 1.0
    assert [r.sequence for r in driver.requests] == [0, 0]


def test_other_episodes_cannot_be_reached_and_closed_ones_are_gone():
    async def main() -> None:
        server = AgentServer()

        async def answer(method: str, path: str, body: bytes) -> openai_api.Answer:
            return openai_api.models(openai_api.Offer(model_name="mine"))

        url, other = await server.add(answer), await server.add(answer)
        assert url.startswith("http://127.0.0.1:")
        assert url != other
        client = openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0)
        assert [model.id async for model in client.models.list()] == ["mine"]
        server.remove(url)
        with pytest.raises(openai.NotFoundError, match="no such episode"):
            await client.models.list()
        await client.close()
        await server.stop()

    run(main())


def test_agent_that_needs_a_url_needs_a_server():
    async def solve(row, base_url):
        return 1

    with pytest.raises(ValueError, match="needs a server"):
        AgentEpisode(solve, start_of(), chat_format())


SCRIPT = """
import json, os, sys
import openai
row = json.load(sys.stdin)
client = openai.OpenAI()
messages = [{"role": "user", "content": row["prompt"]}]
text = client.chat.completions.create(model="policy", messages=messages).choices[0].message.content
"""


def command(tmp_path: Path, script: str) -> dict[str, Any]:
    path = tmp_path / "agent.py"
    path.write_text(textwrap.dedent(script))
    return {"command": ["python", str(path)]}


def test_command_plays_an_episode(tmp_path):
    agent = command(tmp_path, SCRIPT + "print('noise')\nprint(float(text == row['answer'][0]))\nprint()")
    start = start_of(answer=np.array(["4"]))
    driver = play_with_server(agent, start=start)
    assert driver.end.final_reward == 1.0
    text = {"command": f"python {agent['command'][1]}"}
    assert play_with_server(text, start=start).tokens == driver.tokens


@pytest.mark.parametrize(
    ("script", "kind", "words"),
    [
        (SCRIPT + "print('done')", "wrong_type", "returned 'done'"),
        (SCRIPT, "wrong_type", "returned None"),
        (SCRIPT + "print('nan')", "not_finite", "returned nan"),
        (SCRIPT + "raise ValueError('no luck')", "raised", "exit status 1: ValueError: no luck"),
        (SCRIPT + "os.kill(os.getpid(), 9)", "raised", "was killed by signal 9: no output on stderr"),
        ("print(1)", "raised", "never calls the model"),
    ],
)
def test_command_that_fails(tmp_path, script, kind, words):
    with pytest.raises(EpisodeFailed, match=words) as caught:
        play_with_server(command(tmp_path, script), start=start_of("2+2?"))
    assert caught.value.kind == kind


def test_command_that_does_not_exist():
    with pytest.raises(EpisodeFailed, match=r"FileNotFoundError.*no-such-agent") as caught:
        play_with_server({"command": "no-such-agent --fast"})
    assert caught.value.kind == "raised"


def test_row_that_is_no_json(tmp_path):
    with pytest.raises(EpisodeFailed, match="a column holds bytes, which is no JSON"):
        play_with_server(command(tmp_path, SCRIPT), start=start_of(image=b"\xff"))


def test_close_kills_a_command_and_what_it_started(tmp_path):
    script = SCRIPT.replace(
        "text =",
        "import subprocess\nsubprocess.Popen(['sleep', '600'])\nopen(r'{}', 'w').write(str(os.getpgid(0)))\ntext =",
    )
    group = tmp_path / "group"

    async def main() -> None:
        server = AgentServer()
        await closed_early(command(tmp_path, script.replace("{}", str(group))), server=server)
        await server.stop()

    run(main())
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.killpg(int(group.read_text()), 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    pytest.fail("the command's processes are still there")


def test_limit_of_a_command(tmp_path):
    agent = command(tmp_path, SCRIPT + "while True: client.chat.completions.create(model='x', messages=messages)")

    async def main() -> None:
        server = AgentServer()
        driver = Driver(AgentEpisode(agent, start_of(), chat_format(), server=server), lambda r, t: "4")
        driver.max_turns = 2
        try:
            await driver.play()
        finally:
            await server.stop()

    with pytest.raises(EpisodeFailed, match="exit status 1") as caught:
        run(main())
    assert caught.value.kind == "limit"
