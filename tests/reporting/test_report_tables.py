from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from report_runs import additions, group, tool_chat, tries, write_run

from rlhf_ray.reporting.report.tables import MAX_COMPLETIONS, Tables, read_tables, spread

PLENTY = 1_000_000


def tables_of(path: Path, *, count: int = 10, max_tokens: int = PLENTY) -> Tables:
    return read_tables(path / "completions", count=count, max_tokens=max_tokens)


def the_table(path: Path, **limits: int) -> Any:
    (content,) = tables_of(path, **limits).contents
    return content


def test_a_table_as_the_page_reads_it(tmp_path: Path) -> None:
    advantages = [np.asarray(values, dtype=np.float32) for values in ([0.5, 0.25], [-1, 2], [], [0, 0, 1e-5])]
    path = write_run(tmp_path / "run", advantages=advantages, values=[2 * one for one in advantages])
    assert tables_of(path).notes == []
    table = the_table(path)
    assert (table["step"], table["total"]) == (5, 4)
    assert table["groups"] == [
        {"id": 3, "prompt": [{"role": "", "text": "1+1="}], "mean": 0.5},
        {"id": 4, "prompt": [{"role": "", "text": "20+22="}], "mean": 1.0},
    ]
    first, *_, last = table["rows"]
    assert first == {
        "group": 0,
        "reward": 1.0,
        "functions": {},
        "finish": "stop",
        "tokens": 2,
        "version": 3,
        "ids": [ord("2"), 257],
        "texts": ["2", ""],
        "logprobs": [0.0, -0.5],
        "versions": [3, 4],
        "advantages": [0.5, 0.25],
        "values": [1.0, 0.5],
    }
    # A completion that was left out of the loss has none; a small one is not rounded away.
    assert "advantages" not in table["rows"][2]
    assert last["advantages"] == [0.0, 0.0, 1e-5]


def test_a_trajectory_as_the_page_reads_it(tmp_path: Path) -> None:
    nan = math.nan
    advantages = [np.asarray(values, dtype=np.float32) for values in ([0.5, nan, nan, 1.0], [2.0, -1.0])]
    path = write_run(tmp_path / "run", tables={5: [tries(further=("ab",))]}, advantages=advantages)
    (row,) = the_table(path)["rows"]
    assert row == {
        "group": 0,
        "reward": 0.75,
        "functions": {},
        "finish": "turns",
        "tokens": 6,
        "version": 2,
        "environment": "guess",
        "ids": [ord(letter) for letter in "4no7ab"],
        "texts": list("4no7ab"),
        "logprobs": [-0.5, None, None, -0.25, -1.0, -1.0],
        "versions": [3, None, None, 4, 2, 2],
        "advantages": [0.5, None, None, 1.0, 2.0, -1.0],
        "numTurns": 3,
        "numObserved": 2,
        "segments": [
            {"start": 0, "sequence": 0, "turn": 0, "observed": False},
            {"start": 1, "sequence": 0, "turn": 0, "observed": True},
            {"start": 3, "sequence": 0, "turn": 1, "observed": False},
            {"start": 4, "sequence": 1, "turn": 2, "observed": False},
        ],
        "turns": {"0": {"reward": -0.5}, "1": {"reward": 1.0}, "2": {"reward": 0.25}},
        "furtherPrompts": [3],
    }


def test_tool_calls_and_who_answered(tmp_path: Path) -> None:
    (row,) = the_table(write_run(tmp_path / "run", tables={1: [tool_chat()]}))["rows"]
    assert row["turns"] == {
        "0": {"reward": 0.0, "calls": [{"name": "calculator", "arguments": '{"sum": "37+58"}'}], "roles": ["tool"]},
        "1": {"reward": 1.0},
    }


@pytest.mark.parametrize(
    "messages",
    [
        "not json",
        "null",
        "[1, 2, 3]",
        "[" * 100_000,
        '[{"role": "assistant"}]',
        '[{"role": "assistant", "tool_calls": 1}, {"role": "tool"}, {}]',
        '[{"role": "assistant", "tool_calls": [1, {"function": 2}]}, {"role": "tool"}, {}]',
    ],
)
def test_messages_that_cannot_be_read_are_left_out(tmp_path: Path, messages: str) -> None:
    path = write_run(tmp_path / "run", tables={5: [tool_chat()]})
    rewrite(path, messages=messages)
    (row,) = the_table(path)["rows"]
    assert len(row["segments"]) == 3
    assert "calls" not in row["turns"]["0"]


def test_a_call_is_cut_and_a_turn_has_so_many_of_them(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", tables={5: [tool_chat()]})
    call = {"function": {"name": "n" * 5000, "arguments": {"a": "x" * 5000}}}
    messages = [{"role": "assistant", "tool_calls": [call] * 50}, {"role": "tool"}, {"role": "assistant"}]
    rewrite(path, messages=json.dumps(messages))
    calls = the_table(path)["rows"][0]["turns"]["0"]["calls"]
    assert len(calls) == 16
    assert calls[0]["arguments"].startswith('{"a": "xxx')
    assert max(len(text) for one in calls for text in one.values()) < 1010


def test_lists_of_turns_that_do_not_fit_the_tokens_are_no_conversation(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", tables={5: [tries()]})
    rewrite(path, turn=[0])
    (row,) = the_table(path)["rows"]
    assert "segments" not in row
    assert row["texts"] == list("4no7")


def test_the_middle_of_a_long_conversation_is_left_out(tmp_path: Path) -> None:
    text = "".join(chr(ord("a") + number % 26) for number in range(2500))
    path = write_run(tmp_path / "run", tables={1: [tries(further=(text, "end"))]})
    (row,) = the_table(path)["rows"]
    assert row["omitted"] == {"at": 1000, "count": 507}
    assert len(row["texts"]) == 2000
    assert [segment["start"] for segment in row["segments"]] == [0, 1, 3, 4, 1997]
    assert row["segments"][-1]["sequence"] == 2


def rewrite(path: Path, **values: object) -> None:
    """Change the only row of the table."""
    file = path / "completions" / "step_000005.parquet"
    (row,) = pq.read_table(file).to_pylist()
    pq.write_table(pa.Table.from_pylist([row | values], schema=pq.read_schema(file)), file)


def test_an_old_table_has_texts_and_rewards(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    file = path / "completions" / "step_000005.parquet"
    old = pq.read_table(file).select(["group_id", "prompt", "completion", "reward"])
    pq.write_table(old, file)
    table = the_table(path)
    assert table["step"] == 5
    assert table["rows"][0] == {
        "group": 0,
        "reward": 1.0,
        "functions": {},
        "finish": None,
        "tokens": None,
        "version": None,
        "text": "2",
    }


def test_several_reward_functions_are_shown_and_those_that_did_not_apply_are_not(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    file = path / "completions" / "step_000005.parquet"
    table = pq.read_table(file)
    for name, values in {"style": [0.25, None, None, 1.0], "length": [math.nan, 0.5, None, 2.0]}.items():
        table = table.append_column(f"rewards/{name}", pa.array(values, pa.float32()))
    pq.write_table(table, file)
    assert [row["functions"] for row in the_table(path)["rows"]] == [
        {"correct": 1.0, "style": 0.25, "length": None},
        {"correct": 0.0, "length": 0.5},
        {},
        {"correct": 1.0, "style": 1.0, "length": 2.0},
    ]


def test_lists_that_do_not_fit_the_text_are_left_out(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", tables={5: [group(1, "p", ["ab", "cd"], [0.0, 0.0])]})
    file = path / "completions" / "step_000005.parquet"
    rows = pq.read_table(file).to_pylist()
    rows[0]["sampling_logprobs"] = [0.0]
    rows[1]["token_texts"] = ["c", "x", ""]
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(file)), file)
    first, second = the_table(path)["rows"]
    assert first["texts"] == ["a", "b", ""]
    assert "logprobs" not in first
    assert second["text"] == "cd"
    assert "versions" not in second


def test_a_chat_is_its_messages(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße?"}]
    path = write_run(tmp_path / "run", tables={1: [group(1, chat, ["Hallo"], [0.0])]})
    (of_group,) = the_table(path)["groups"]
    assert of_group["prompt"] == [{"role": "system", "text": "Be brief."}, {"role": "user", "text": "Grüße?"}]


@pytest.mark.parametrize("prompt", ["[{not json", '[{"a": 1}]', "[1, 2]"])
def test_a_prompt_that_looks_like_a_chat_is_text(tmp_path: Path, prompt: str) -> None:
    path = write_run(tmp_path / "run", tables={1: [group(1, prompt, ["x"], [0.0])]})
    assert the_table(path)["groups"][0]["prompt"] == [{"role": "", "text": prompt}]


def test_the_middle_of_a_long_completion_is_left_out(tmp_path: Path) -> None:
    text = "".join(chr(ord("a") + number % 26) for number in range(2500))
    path = write_run(tmp_path / "run", tables={1: [group(1, "p", [text], [0.0], finish="length")]})
    (row,) = the_table(path)["rows"]
    assert row["omitted"] == {"at": 1000, "count": 501}
    assert "".join(row["texts"]) == text[:1000] + text[1501:]
    assert {len(row[name]) for name in ("ids", "texts", "logprobs", "versions")} == {2000}
    assert row["tokens"] == 2501
    assert row["finish"] == "length"


def test_the_middle_of_a_long_prompt_is_left_out(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", tables={1: [group(1, "a" * 6000 + "b" * 6000, ["x"], [0.0])]})
    text = the_table(path)["groups"][0]["prompt"][0]["text"]
    assert text == "a" * 4000 + "\n[... 4000 characters left out ...]\n" + "b" * 4000


def test_whole_groups_spread_over_the_table_up_to_the_limit(tmp_path: Path) -> None:
    groups = [group(number, "p", ["a", "b", "c", "d"], [0, 0, 1, 1]) for number in range(40)]
    table = the_table(write_run(tmp_path / "run", tables={1: groups}))
    assert table["total"] == 160
    assert len(table["rows"]) == MAX_COMPLETIONS
    ids = [one["id"] for one in table["groups"]]
    assert len(ids) == MAX_COMPLETIONS // 4
    assert (ids[0], ids[-1]) == (0, 39)
    assert all(one["mean"] == 0.5 for one in table["groups"])


@pytest.mark.parametrize(("max_tokens", "kept"), [(1, 1), (21, 1), (22, 2), (33, 3), (44, 4), (PLENTY, 4)])
def test_a_table_keeps_to_its_tokens_and_has_a_row_at_least(tmp_path: Path, max_tokens: int, kept: int) -> None:
    groups = [group(number, "p", ["0123456789"] * 2, [0.0, 1.0]) for number in range(2)]
    path = write_run(tmp_path / "run", tables={1: groups})
    table = the_table(path, max_tokens=max_tokens)
    assert len(table["rows"]) == kept
    # The mean is that of the whole group, also of one that is cut.
    assert table["groups"][0]["mean"] == 0.5


def test_tables_are_spread_over_the_run(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", tables={step: additions() for step in range(1, 12)})
    assert [table["step"] for table in tables_of(path, count=3).contents] == [1, 6, 11]
    assert [table["step"] for table in tables_of(path, count=1).contents] == [11]


@pytest.mark.parametrize(
    ("length", "count", "chosen"),
    [(0, 3, []), (2, 3, [0, 1]), (3, 3, [0, 1, 2]), (10, 4, [0, 3, 6, 9]), (10, 1, [9]), (1, 1, [0]), (5, 2, [0, 4])],
)
def test_spread(length: int, count: int, chosen: list[int]) -> None:
    assert spread(range(length), count) == chosen


def test_a_damaged_table_costs_that_table_and_is_named(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", tables={step: additions() for step in (1, 2, 3, 4)})
    folder = path / "completions"
    whole = (folder / "step_000002.parquet").read_bytes()
    (folder / "step_000002.parquet").write_bytes(whole[: len(whole) // 2])
    pq.write_table(pa.table({"prompt": ["p"]}), folder / "step_000003.parquet")
    (folder / "step_000005.tmp").write_bytes(whole[:10])
    tables = tables_of(path)
    assert [table["step"] for table in tables.contents] == [1, 4]
    assert tables.notes == [
        "completions/step_000002.parquet cannot be read (ArrowInvalid).",
        "completions/step_000003.parquet cannot be read (KeyError).",
    ]


def test_an_empty_table_is_one_without_rows(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", tables={7: []})
    assert the_table(path) == {"step": 7, "total": 0, "groups": [], "rows": []}


def test_a_run_without_tables_says_so(tmp_path: Path) -> None:
    assert tables_of(tmp_path).notes == ("There are no completions (reporting.completions_interval).",)
