"""Agents of other frameworks, unchanged."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import openai
import pydantic
import pytest
from environments.agent_driver import Driver, Policy, call_of, chat_format, start_of

from rlhf_ray.environments.agent import AgentEpisode
from rlhf_ray.environments.agent_server import AgentServer
from rlhf_ray.environments.episode import EpisodeFailed

VALUES = {"x": 5, "y": 7}
EXTRA = "extra test-agents"


class Sum(pydantic.BaseModel):
    total: int


def lookup(name: str) -> int:
    """Look a number up."""
    return VALUES[name]


def play(agent: Any, policy: Policy, **settings: Any) -> Driver:
    """Play an episode to its end, with a URL for agents that ask for one."""

    async def main() -> Driver:
        server = AgentServer()
        episode = AgentEpisode(agent, start_of(), chat_format(), parses_tools=True, server=server)
        driver = Driver(episode, policy)
        for name, value in settings.items():
            setattr(driver, name, value)
        try:
            await driver.play()
        finally:
            await server.stop()
        return driver

    return asyncio.run(main())


def adds(request: Any, text: str) -> Any:
    """Look two numbers up, both at once, then answer with their sum."""
    if "<tool_response>" not in text:
        calls = [call_of("lookup", call_id=f"c{i}", name=name)["tool_calls"][0] for i, name in enumerate(("x", "y"))]
        return {"role": "assistant", "content": "", "tool_calls": calls}
    return "The sum is 12."


def looks_up_for_ever(request: Any, text: str) -> Any:
    return call_of("lookup", name="x")


def check(driver: Driver) -> None:
    """Both results were read in the sequence in which they were asked for."""
    assert driver.end is not None
    assert driver.end.final_reward == 1.0
    assert [request.sequence for request in driver.requests] == [0, 0]
    text = driver.text(0)
    assert '"name": "lookup"' in text
    assert "<tool_response>\n5\n</tool_response>\n<tool_response>\n7\n</tool_response>" in text
    assert text.endswith("The sum is 12.<|im_end|>")
    assert {message["role"] for message in driver.requests[1].messages} == {"tool"}


# --- OpenAI's Agents SDK ----------------------------------------------------------------------------------------------


@pytest.fixture
def agents() -> Any:
    sdk = pytest.importorskip("agents", reason=f"{EXTRA}: openai-agents")
    sdk.set_tracing_disabled(True)
    return sdk


def summer(agents: Any, client: Any, **fields: Any) -> Any:
    model = agents.OpenAIChatCompletionsModel(model="policy", openai_client=client)
    tools = [agents.function_tool(lookup)]
    return agents.Agent(name="Summer", instructions="Add the numbers.", model=model, tools=tools, **fields)


@pytest.mark.parametrize("way", ["run", "run_streamed", "by_url"])
def test_openai_agents_sdk(agents: Any, way: str) -> None:
    async def solve(row: Any, client: Any) -> float:
        agent = summer(agents, client)
        if way == "run_streamed":
            result = agents.Runner.run_streamed(agent, row["prompt"])
            async for _ in result.stream_events():
                pass
        else:
            result = await agents.Runner.run(agent, row["prompt"])
        return float("12" in result.final_output)

    def solve_by_url(row: Any, base_url: str, api_key: str) -> float:
        async def main() -> float:
            async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
                return await solve(row, client)

        return asyncio.run(main())

    check(play(solve_by_url if way == "by_url" else solve, adds))


def test_openai_agents_sdk_hands_off_in_a_sequence_of_its_own(agents: Any) -> None:
    async def solve(row: Any, client: Any) -> float:
        front = agents.Agent(
            name="Front",
            instructions="Find who can help.",
            model=agents.OpenAIChatCompletionsModel(model="policy", openai_client=client),
            handoffs=[summer(agents, client)],
        )
        result = await agents.Runner.run(front, row["prompt"])
        return float("12" in result.final_output and result.last_agent.name == "Summer")

    def policy(request: Any, text: str) -> Any:
        if "Find who can help." in text:
            return call_of("transfer_to_summer", call_id="h1")
        return "The sum is 12." if text.count("<tool_response>") == 3 else adds(request, "")

    driver = play(solve, policy)
    assert driver.end is not None
    assert driver.end.final_reward == 1.0
    assert [request.sequence for request in driver.requests] == [0, 1, 1]


def test_openai_agents_sdk_asks_an_agent_as_a_tool(agents: Any) -> None:
    async def solve(row: Any, client: Any) -> float:
        model = agents.OpenAIChatCompletionsModel(model="policy", openai_client=client)
        tools = [summer(agents, client).as_tool(tool_name="add_up", tool_description="Add.")]
        boss = agents.Agent(name="Boss", instructions="Be the boss.", model=model, tools=tools)
        return float((await agents.Runner.run(boss, row["prompt"])).final_output == "12, says Summer.")

    def policy(request: Any, text: str) -> Any:
        if "Be the boss." not in text:
            return adds(request, text)
        return "12, says Summer." if "The sum is 12." in text else call_of("add_up", call_id="b1", input="x and y")

    driver = play(solve, policy)
    assert driver.end is not None
    assert driver.end.final_reward == 1.0
    assert [request.sequence for request in driver.requests] == [0, 1, 1, 0]
    assert "<tool_response>\nThe sum is 12.\n</tool_response>" in driver.text(0)


def test_openai_agents_sdk_over_its_responses_api_is_refused_by_name(agents: Any) -> None:
    async def solve(row: Any, client: Any) -> float:
        model = agents.OpenAIResponsesModel(model="policy", openai_client=client)
        await agents.Runner.run(agents.Agent(name="Summer", model=model), row["prompt"])
        return 1.0

    with pytest.raises(EpisodeFailed, match="use chat completions, for example OpenAIChatCompletionsModel"):
        play(solve, adds)


# --- pydantic-ai ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pydantic_ai() -> Any:
    return pytest.importorskip("pydantic_ai", reason=f"{EXTRA}: pydantic-ai-slim[openai]")


def adder(pydantic_ai: Any, *, client: Any = None, output_type: Any = str, **provided: Any) -> Any:
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(**provided) if client is None else OpenAIProvider(openai_client=client)
    model = OpenAIChatModel("policy", provider=provider)
    return pydantic_ai.Agent(model, instructions="Add the numbers.", tools=[lookup], output_type=output_type)


@pytest.mark.parametrize("way", ["run", "run_stream", "by_url"])
def test_pydantic_ai(pydantic_ai: Any, way: str) -> None:
    async def solve(row: Any, client: Any) -> float:
        agent = adder(pydantic_ai, client=client)
        if way == "run_stream":
            async with agent.run_stream(row["prompt"]) as result:
                return float("12" in await result.get_output())
        return float("12" in (await agent.run(row["prompt"])).output)

    def solve_by_url(row: Any, base_url: str, api_key: str) -> float:
        agent = adder(pydantic_ai, base_url=base_url, api_key=api_key)
        return float("12" in agent.run_sync(row["prompt"]).output)

    check(play(solve_by_url if way == "by_url" else solve, adds))


@pytest.mark.parametrize("form", ["tool", "prompted"])
def test_pydantic_ai_asks_again_for_the_form_that_it_wants(pydantic_ai: Any, form: str) -> None:
    async def solve(row: Any, client: Any) -> float:
        output_type = Sum if form == "tool" else pydantic_ai.PromptedOutput(Sum)
        agent = adder(pydantic_ai, client=client, output_type=output_type)
        return float((await agent.run(row["prompt"])).output.total == 12)

    def policy(request: Any, text: str) -> Any:
        if text.count("<|im_start|>assistant") == 1:
            return "It is 12."
        return call_of("final_result", total=12) if form == "tool" else '{"total": 12}'

    driver = play(solve, policy)
    assert driver.end is not None
    assert driver.end.final_reward == 1.0
    assert [request.sequence for request in driver.requests] == [0, 0]
    assert "failed the application's validation" in driver.requests[1].messages[-1]["content"]


# --- both -------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["agents", "pydantic_ai"])
def solve(request: pytest.FixtureRequest) -> Callable[[Any, Any], Any]:
    """An agent that does not catch what its framework raises."""
    framework = request.getfixturevalue(request.param)

    async def with_agents(row: Any, client: Any) -> float:
        return float("12" in (await framework.Runner.run(summer(framework, client), row["prompt"])).final_output)

    async def with_pydantic_ai(row: Any, client: Any) -> float:
        return float("12" in (await adder(framework, client=client).run(row["prompt"])).output)

    return with_agents if request.param == "agents" else with_pydantic_ai


@pytest.mark.parametrize("reason", ["turns", "length"])
def test_limits_are_recognized_however_they_are_wrapped(solve: Any, reason: str) -> None:
    with pytest.raises(EpisodeFailed, match=r"no (turns|tokens) are left in this episode") as caught:
        play(solve, looks_up_for_ever, max_turns=2, cut_reason=reason)
    assert caught.value.kind == "limit"


def test_a_call_that_was_cut_is_the_last_word(solve: Any) -> None:
    driver = play(solve, adds, finish_reason="length")
    assert driver.end is not None
    assert driver.end.final_reward == 0.0
    assert len(driver.requests) == 1


def test_what_a_framework_raises_over_the_policys_words_may_be_caught(solve: Any) -> None:
    async def careful(row: Any, client: Any) -> float:
        try:
            return float(await solve(row, client))
        except Exception as error:
            assert "forget" in str(error) or "retries" in str(error)
            return -1.0

    driver = play(careful, lambda request, text: call_of("forget", name="x"))
    assert driver.end is not None
    assert (driver.end.finish_reason, driver.end.final_reward) == ("stop", -1.0)
