from __future__ import annotations

import asyncio
import json
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from rlhf_ray.environments.environment import Action, Environment, Step
from rlhf_ray.environments.episode import EpisodeFailed
from rlhf_ray.environments.tools import ToolEnvironment, ToolError, resolve_tools, tool_schemas
from rlhf_ray.errors import ConfigError


def calculator(expression: str) -> str:
    """Compute an arithmetic expression.

    Args:
        expression: What to compute, such as ``1 + 2``.
    """
    left, right = expression.split("+")
    return str(int(left) + int(right))


async def lookup(key: str, depth: int | None = None, kind: Literal["a", "b"] = "a") -> dict[str, Any]:
    """Look something up.

    Args:
        key: What to look up.
        depth: How deep.
        kind: Of what kind.
    """
    await asyncio.sleep(0)
    return {"key": key, "depth": depth, "kind": kind}


class Shop:
    """A shop, whose cart differs between episodes."""

    def __init__(self, catalog: Mapping[str, int], greeting: str = "") -> None:
        self._catalog = catalog
        self._cart: list[str] = []

    def reset(self, row: Mapping[str, Any]) -> None:
        self._cart = [*row.get("cart", [])]

    def add(self, item: str) -> str:
        """Add an item to the cart.

        Args:
            item: Its name.
        """
        time.sleep(0.01 if item == "slow" else 0)
        self._cart.append(item)
        return ", ".join(self._cart)

    async def total(self, row: dict[str, Any]) -> int:
        """The price of all items."""
        return sum(self._catalog[item] for item in self._cart) + row.get("tax", 0)

    @staticmethod
    def currency() -> str:
        """The currency of prices."""
        return "EUR"


def call(name: str, arguments: object, call_id: str = "1") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def action(*calls: dict[str, Any], truncated: bool = False) -> Action:
    message = {"role": "assistant", "content": "", **({"tool_calls": list(calls)} if calls else {})}
    return Action(text="", message=message, token_ids=(1,), truncated=truncated)


def play(environment: ToolEnvironment, *actions: Action, row: Mapping[str, Any] | None = None) -> list[Step]:
    async def episode() -> list[Step]:
        await environment.reset(row or {}, 0)
        try:
            return [await environment.step(one) for one in actions]
        finally:
            await environment.close()

    return asyncio.run(asyncio.wait_for(episode(), 30))


def contents(step: Step) -> list[str]:
    assert step.observation is not None
    return [message["content"] for message in step.observation]  # type: ignore[index, union-attr]


def answer(environment: ToolEnvironment, name: str, arguments: object, **options: Any) -> str:
    (step,) = play(environment, action(call(name, arguments)), **options)
    (content,) = contents(step)
    return content


def properties(tool: Any) -> dict[str, Any]:
    (schema,) = tool_schemas([tool])
    return schema["function"]["parameters"]


# ---- Schemas ----


def test_schema_of_a_function() -> None:
    assert tool_schemas([calculator]) == [
        {
            "type": "function",
            "function": {
                "name": "calculator",
                "description": "Compute an arithmetic expression.",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "expression": {"type": "string", "description": "What to compute, such as ``1 + 2``."}
                    },
                    "required": ["expression"],
                },
            },
        }
    ]


def test_bound_arguments_and_the_row_are_not_in_the_schema() -> None:
    assert list(properties({"name": lookup, "kind": "b"})["properties"]) == ["key", "depth"]
    assert list(properties(Shop(catalog={}).total)["properties"]) == []


def test_methods_of_a_class_are_tools() -> None:
    schemas = tool_schemas([{"name": Shop, "catalog": {}}])

    assert [schema["function"]["name"] for schema in schemas] == ["add", "currency", "total"]
    assert schemas[0]["function"]["parameters"]["required"] == ["item"]


def test_references_name_functions_and_classes(tmp_path: Path) -> None:
    path = tmp_path / "my_tools.py"
    path.write_text(
        'def shout(text: str, times: int) -> str:\n    """Shout.\n\n    Args:\n        text: What.\n    """\n'
        "    return text.upper() * times\n"
    )
    tool = {"name": f"{path}:shout", "times": 2}

    assert list(properties(tool)["properties"]) == ["text"]
    assert answer(ToolEnvironment([tool]), "shout", '{"text": "a"}') == "AA"


def no_docstring(text: str) -> str:
    return text


def no_types(text):  # type: ignore[no-untyped-def]
    """Have no types.

    Args:
        text: Untyped.
    """


def undescribed(text: str) -> str:
    """Describe no parameter."""
    return text


def only_result() -> str:
    """Returns:
    A text.
    """
    return ""


def any_number(*texts: str) -> str:
    """Take any number.

    Args:
        texts: Some.
    """
    return ""


def any_names(**texts: str) -> str:
    """Take any names.

    Args:
        texts: Some.
    """
    return ""


def takes_path(path: Path) -> str:
    """Take a path.

    Args:
        path: A path.
    """
    return ""


def takes_list_of_paths(paths: list[Path] | None) -> str:
    """Take paths.

    Args:
        paths: Paths.
    """
    return ""


def unknown_type(text: Missing) -> str:  # type: ignore[name-defined] # noqa: F821
    """Have a type that does not exist.

    Args:
        text: A text.
    """
    return ""


def positional(text: str, /) -> str:
    """Take an argument without a name.

    Args:
        text: A text.
    """
    return text


def yields(text: str) -> Any:
    """Yield.

    Args:
        text: A text.
    """
    yield text


class Game(Environment):
    pass


class Empty:
    def _hidden(self) -> None: ...


class Careless:
    def find(self, key: str) -> str:
        return key


class Callable_:
    def __call__(self, text: str) -> str:
        return text


@pytest.mark.parametrize(
    "tool, remedy",
    [
        (no_docstring, "no_docstring has no docstring, which the policy reads: write"),
        (no_types, "'text' of no_types has no type: write 'text: str'"),
        (undescribed, "no description for the argument 'text'; write"),
        (only_result, "does not say what it does"),
        (any_number, r"no schema can describe \*texts"),
        (any_names, r"no schema can describe \*\*texts"),
        (takes_path, "JSON has no Path, the type of 'path' of takes_path: use int,"),
        (takes_list_of_paths, "JSON has no Path"),
        (unknown_type, "the signature of unknown_type cannot be read .NameError"),
        (positional, "'text' is positional only"),
        (yields, "yields: return the result"),
        (lambda text: text, "a lambda has no name"),
        (Callable_(), "must be a function, a class"),
        (3, "must be a function, a class"),
        ({"index": 1}, "must be a function, a class"),
        ({"name": calculator, "digits": 3}, "calculator has no argument 'digits'"),
        ({"name": calculator, "expresion": "1"}, "nearest: 'expression'"),
        (Shop, r"Shop cannot be made .*'catalog'.*write \{name:"),
        ({"name": Shop, "catalog": {}, "price": 1}, "Shop cannot be made .*'price'"),
        (Game, r"Game is an environment: .environment\(Game\)"),
        (Empty, "Empty has no public methods"),
        (Careless, "Careless: find has no docstring.*named _find"),
        ("missing_module:tool", "no module 'missing_module'"),
        ("json", "write 'module:function'"),
    ],
)
def test_refused_tools(tool: Any, remedy: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){remedy}") as caught:
        resolve_tools([calculator, tool])

    assert caught.value.field == "environment.tools[1]"
    assert caught.value.value == tool


def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"environment.tools\[0\] has a tool 'calculator' already") as caught:
        resolve_tools([calculator, lookup, calculator])

    assert caught.value.field == "environment.tools[2]"


@pytest.mark.parametrize("tools", ["tools.py:calculator", calculator, {"name": calculator}])
def test_tools_must_be_a_list(tools: Any) -> None:
    with pytest.raises(ConfigError, match="must be a list"):
        tool_schemas(tools)


@pytest.mark.parametrize(
    "options, field",
    [
        ({"on_error": "ignore"}, "environment.on_error"),
        ({"max_result_chars": 0}, "environment.max_result_chars"),
        ({"max_result_chars": True}, "environment.max_result_chars"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ToolEnvironment([calculator], **options)

    assert caught.value.field == field


# ---- Turns ----


def test_results_are_messages_in_the_order_of_the_calls() -> None:
    asked = action(call("lookup", {"key": "k"}, "a"), call("calculator", '{"expression": "1+2"}', "b"))
    (step,) = play(ToolEnvironment([calculator, lookup]), asked)

    first = {"role": "tool", "tool_call_id": "a", "name": "lookup"}
    assert step == Step(
        observation=[
            {**first, "content": '{"key": "k", "depth": null, "kind": "a"}'},
            {"role": "tool", "tool_call_id": "b", "name": "calculator", "content": "3"},
        ],
        metrics={"tool_calls": 2.0, "tool_errors": 0.0},
    )


def test_reset_leaves_the_prompt_of_the_row() -> None:
    async def begin() -> object:
        return await ToolEnvironment([calculator]).reset({"prompt": "1+2="}, 0)  # type: ignore[func-returns-value]

    assert asyncio.run(begin()) is None


@pytest.mark.parametrize("message", [{}, {"tool_calls": None}, {"tool_calls": []}])
def test_a_turn_without_calls_ends_the_episode(message: dict[str, Any]) -> None:
    said = Action(text="3", message={"role": "assistant", "content": "3", **message}, token_ids=(1,), truncated=False)
    (step,) = play(ToolEnvironment([calculator]), said)

    assert step.done
    assert not step.truncated
    assert step.observation is None


def test_calls_of_a_truncated_turn_are_not_executed() -> None:
    calls = []

    def record(text: str) -> str:
        """Record.

        Args:
            text: A text.
        """
        calls.append(text)
        return ""

    cut = action(call("record", '{"text": "cut"}'), truncated=True)
    whole = action(call("record", '{"text": "whole"}'))
    environment = ToolEnvironment([record])

    assert play(environment, cut) == [Step(truncated=True, metrics={"tool_calls": 0.0, "tool_errors": 0.0})]
    play(environment, whole)
    assert calls == ["whole"]


def test_calls_of_a_turn_run_at_once() -> None:
    barrier = threading.Barrier(2)

    def meet(name: str) -> str:
        """Wait for the other call.

        Args:
            name: Whose.
        """
        barrier.wait(timeout=10)
        return name

    (step,) = play(ToolEnvironment([meet]), action(call("meet", {"name": "a"}), call("meet", {"name": "b"})))

    assert contents(step) == ["a", "b"]


@pytest.mark.parametrize(
    "name, arguments, text",
    [
        ("calculater", "{}", "error: there is no tool 'calculater'; there are: calculator, lookup"),
        (None, "{}", "error: there is no tool 'None'; there are: calculator, lookup"),
        ("calculator", '{"expression": ', "error: the arguments of calculator are no JSON: Expecting value: line 1"),
        ("calculator", "[" * 100_000, "error: the arguments of calculator are no JSON: maximum recursion"),
        ("calculator", '{"expression": NaN}', "error: the arguments of calculator are no JSON: NaN is no JSON value"),
        ("calculator", '"1+2"', "error: the arguments of calculator must be a JSON object, not str"),
        ("calculator", ["1+2"], "error: the arguments of calculator must be a JSON object, not list"),
        ("calculator", "{}", "error: calculator needs the argument 'expression'; its arguments are: expression"),
        ("calculator", "", "error: calculator needs the argument 'expression'"),
        ("calculator", None, "error: calculator needs the argument 'expression'"),
        ("calculator", '{"expression": 3}', "error: the argument 'expression' of calculator does not fit: 3 is not of"),
        ("calculator", {"expression": "1", "x": 1}, "error: calculator has no argument 'x'; its arguments are:"),
        ("calculator", {"expression": "1", "row": {}}, "error: calculator has no argument 'row'"),
        ("lookup", {"key": "k", "depth": "3"}, "error: the argument 'depth' of lookup does not fit"),
        ("lookup", {"key": "k", "depth": 3.0}, "error: the argument 'depth' of lookup does not fit"),
        ("lookup", {"key": "k", "depth": True}, "error: the argument 'depth' of lookup does not fit"),
        ("lookup", {"key": None}, "error: the argument 'key' of lookup does not fit"),
        ("lookup", {"key": "k", "kind": "c"}, "error: the argument 'kind' of lookup does not fit: 'c' is not one of"),
    ],
)
@pytest.mark.parametrize("on_error", ["observe", "fail"])
def test_a_wrong_call_is_answered_with_a_text(name: Any, arguments: object, text: str, on_error: Any) -> None:
    environment = ToolEnvironment([calculator, lookup], on_error=on_error)
    (step,) = play(environment, action(call(name, arguments)))

    assert contents(step)[0].startswith(text)
    assert step.metrics == {"tool_calls": 1.0, "tool_errors": 1.0}
    assert not step.done


def test_a_call_without_a_function_is_answered_with_a_text() -> None:
    (step,) = play(ToolEnvironment([calculator]), action({"id": "1", "type": "function"}))

    assert contents(step) == ["error: there is no tool 'None'; there are: calculator"]


def test_null_fits_an_optional_argument() -> None:
    assert json.loads(answer(ToolEnvironment([lookup]), "lookup", '{"key": "k", "depth": null}'))["depth"] is None


def raising(error: BaseException) -> Callable[[], str]:
    def tool() -> str:
        """Raise."""
        raise error

    return tool


async def broken() -> str:
    """Raise after a while."""
    await asyncio.sleep(0)
    raise KeyError("k")


@pytest.mark.parametrize(
    "tool, text",
    [
        (raising(ValueError("bad")), "error: ValueError: bad"),
        (raising(ValueError()), "error: ValueError"),
        (raising(ToolError("the shop is closed")), "error: the shop is closed"),
        (raising(StopIteration()), "error: StopIteration"),
        (raising(SystemExit(3)), "error: SystemExit: 3"),
        (broken, "error: KeyError: 'k'"),
    ],
)
def test_a_tool_that_raises_is_an_observation_or_a_failure(tool: Callable[..., Any], text: str) -> None:
    asked = action(call(tool.__name__, "{}"))
    (step,) = play(ToolEnvironment([tool]), asked)

    assert contents(step) == [text]
    assert step.metrics["tool_errors"] == 1.0
    with pytest.raises(
        EpisodeFailed, match=f"the tool {tool.__name__} raised {text.removeprefix('error: ')}"
    ) as caught:
        play(ToolEnvironment([tool], on_error="fail"), asked)
    assert caught.value.kind == "raised"


def test_a_tool_can_fail_the_episode() -> None:
    with pytest.raises(EpisodeFailed, match="no answer"):
        play(ToolEnvironment([raising(EpisodeFailed("timeout", "no answer"))]), action(call("tool", "{}")))


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    "result, text",
    [
        ("é", "é"),
        (None, "null"),
        ([1, "é"], '[1, "é"]'),
        ({(1, 2): 3}, "{(1, 2): 3}"),
        ({1}, "{1}"),
        (Unprintable(), "error: RuntimeError: no text"),
        ("a\ud800b", "a?b"),
        ("x" * 11, "x" * 10 + "\n[1 more characters were cut]"),
        ("x" * 10, "x" * 10),
    ],
)
def test_results_become_text(result: object, text: str) -> None:
    def tool() -> object:
        """Return something."""
        return result

    limit = 10 if isinstance(result, str) else 100
    assert answer(ToolEnvironment([tool], max_result_chars=limit), "tool", "{}") == text


def test_a_tool_reads_its_own_copy_of_the_row() -> None:
    def spoil(row: dict[str, Any]) -> str:
        """Read the row, and change it."""
        return str(row["answers"].pop())

    row = {"answers": [1, 2]}

    assert answer(ToolEnvironment([spoil]), "spoil", "{}", row=row) == "2"
    assert row == {"answers": [1, 2]}


# ---- Classes ----


def test_each_episode_has_an_object_of_its_own() -> None:
    environment = ToolEnvironment([{"name": Shop, "catalog": {"pen": 3, "slow": 4}}])
    adds = action(call("add", {"item": "slow"}), call("add", {"item": "pen"}))
    total = action(call("total", ""))

    first, price = play(environment, adds, total, row={"cart": ["pen"], "tax": 1})
    (second,) = play(environment, adds)

    # In the order of the calls, although the first one takes longer.
    assert contents(first) == ["pen, slow", "pen, slow, pen"]
    assert contents(price) == ["11"]
    assert contents(second) == ["slow", "slow, pen"]


def test_objects_are_closed_also_when_another_one_fails() -> None:
    closed = []

    class Leaky:
        def read(self) -> str:
            """Read."""
            return ""

        def close(self) -> None:
            raise OSError("disk full")

    class Tidy:
        def write(self) -> str:
            """Write."""
            return ""

        async def close(self) -> None:
            closed.append(self)

    with pytest.raises(EpisodeFailed, match="could not be closed: OSError: disk full"):
        play(ToolEnvironment([Leaky, Tidy]))
    assert len(closed) == 1


@pytest.mark.parametrize(
    "answer, kind, message",
    [
        ("welcome", "wrong_type", "Opening.reset returned str: the prompt is the row's"),
        (ValueError("no row"), "raised", "the tools look could not be made: ValueError: no row"),
    ],
)
def test_a_class_that_cannot_begin_fails_the_episode(answer: Any, kind: str, message: str) -> None:
    class Opening:
        def reset(self, row: Mapping[str, Any]) -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer

        def look(self) -> str:
            """Look."""
            return ""

    with pytest.raises(EpisodeFailed, match=message) as caught:
        play(ToolEnvironment([Opening]))
    assert caught.value.kind == kind


# ---- Workers ----

ELSEWHERE = """
import asyncio, pickle, sys
from rlhf_ray.environments.environment import Action
from rlhf_ray.environments.tools import ToolEnvironment

async def main():
    environment = ToolEnvironment(pickle.load(sys.stdin.buffer))
    await environment.reset({}, 0)
    for name, arguments in (("calculator", {"expression": "1+2"}), ("shout", {"text": "a"}), ("add", {"item": "pen"})):
        message = {"tool_calls": [{"id": "1", "function": {"name": name, "arguments": arguments}}]}
        step = await environment.step(Action(text="", message=message, token_ids=(1,), truncated=False))
        print(step.observation[0]["content"])

asyncio.run(main())
"""


def test_tools_travel_to_processes_that_cannot_import_them(tmp_path: Path) -> None:
    path = tmp_path / "lone.py"
    path.write_text(
        'MARK = "!"\n\ndef shout(text: str) -> str:\n    """Shout.\n\n    Args:\n        text: What.\n    """\n'
        "    return text.upper() + MARK\n"
    )
    tools: Sequence[Any] = [calculator, f"{path}:shout", {"name": Shop, "catalog": {}}]
    payload = pickle.dumps(resolve_tools(tools))
    path.unlink()

    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], input=payload, capture_output=True, timeout=60, check=False
    )

    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().split() == ["3", "A!", "pen"]
