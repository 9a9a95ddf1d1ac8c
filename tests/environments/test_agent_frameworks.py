"""Agents of other frameworks, unchanged."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from environments.agent_driver import Driver, call_of, play

from rlhf_ray.environments.agent_server import AgentServer


def policy(request: Any, text: str) -> Any:
    """Look two numbers up, both at once, then answer with their sum."""
    if "<tool_response>" not in text:
        calls = [call_of("lookup", call_id=f"c{i}", name=name)["tool_calls"][0] for i, name in enumerate(("x", "y"))]
        return {"role": "assistant", "content": "", "tool_calls": calls}
    return "The sum is 12."


def with_server(agent: Any) -> Driver:
    async def main() -> Driver:
        server = AgentServer()
        try:
            return await play(agent, policy, parses_tools=True, server=server)
        finally:
            await server.stop()

    return asyncio.run(main())


def check(driver: Driver) -> None:
    assert driver.end is not None
    assert driver.end.final_reward == 1.0
    assert [request.sequence for request in driver.requests] == [0, 0]
    text = driver.text(0)
    assert '"name": "lookup"' in text
    assert "<tool_response>\n5\n</tool_response>\n<tool_response>\n7\n</tool_response>" in text
    assert text.endswith("The sum is 12.<|im_end|>")
    assert {message["role"] for message in driver.requests[1].messages} == {"tool"}


VALUES = {"x": 5, "y": 7}


@pytest.mark.parametrize("streamed", [False, True])
def test_openai_agents_sdk(streamed):
    agents = pytest.importorskip("agents", reason="extra test-agents: openai-agents")

    async def solve(row: Any, client: Any) -> float:
        agents.set_tracing_disabled(True)

        @agents.function_tool
        def lookup(name: str) -> int:
            """Look a number up."""
            return VALUES[name]

        model = agents.OpenAIChatCompletionsModel(model="policy", openai_client=client)
        agent = agents.Agent(name="Summer", instructions="Add the numbers.", model=model, tools=[lookup])
        if streamed:
            result = agents.Runner.run_streamed(agent, row["prompt"])
            async for _ in result.stream_events():
                pass
        else:
            result = await agents.Runner.run(agent, row["prompt"])
        return float("12" in result.final_output)

    check(asyncio.run(play(solve, policy, parses_tools=True)))


@pytest.mark.parametrize("by_url", [False, True])
def test_pydantic_ai(by_url):
    pydantic_ai = pytest.importorskip("pydantic_ai", reason="extra test-agents: pydantic-ai-slim[openai]")
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    def made(provider: Any) -> Any:
        agent = pydantic_ai.Agent(OpenAIChatModel("policy", provider=provider), instructions="Add the numbers.")

        @agent.tool_plain
        def lookup(name: str) -> int:
            """Look a number up."""
            return VALUES[name]

        return agent

    async def solve(row: Any, client: Any) -> float:
        result = await made(OpenAIProvider(openai_client=client)).run(row["prompt"])
        return float("12" in result.output)

    def solve_by_url(row: Any, base_url: str, api_key: str) -> float:
        result = made(OpenAIProvider(base_url=base_url, api_key=api_key)).run_sync(row["prompt"])
        return float("12" in result.output)

    check(with_server(solve_by_url if by_url else solve))
