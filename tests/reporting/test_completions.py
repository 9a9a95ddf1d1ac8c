from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from report_runs import estimates, tool_chat, tries

from rlhf_ray.config.settings import Settings
from rlhf_ray.quickstart.tokenizer import EOS_TOKEN_ID
from rlhf_ray.reporting import RunDirectory
from rlhf_ray.reporting.completions import CompletionsReporter, completions_path
from rlhf_ray.types import ScoredGroup, VersionSpan


def started(run_dir: RunDirectory) -> CompletionsReporter:
    return CompletionsReporter(Settings(), run_dir)


def test_one_row_per_completion(run_dir: RunDirectory, groups: list[ScoredGroup]) -> None:
    started(run_dir).report_completions(1, groups)
    path = run_dir.completions / "step_000001.parquet"
    assert path == completions_path(run_dir, 1)
    rows = pq.read_table(path).to_pylist()
    assert rows[0] == {
        "step": 1,
        "group_id": 7,
        "environment": None,
        "prompt": "1+1=",
        "completion": "2",
        "reward": 1.0,
        "rewards/reward": 1.0,
        "rewards/style": 0.5,
        "finish_reason": "stop",
        "num_tokens": 2,
        "num_turns": 1,
        "version": 3,
        "token_ids": [ord("2"), EOS_TOKEN_ID],
        "token_texts": ["2", ""],
        "sampled": [True, True],
        "turn": [0, 0],
        "sequence": [0, 0],
        "sampling_logprobs": [0.0, -0.25],
        "token_versions": [3, 4],
        "advantages": None,
        "values": None,
        "turn_rewards": [0.0],
        "further_prompts": [],
        "messages": None,
        "message_turns": None,
    }
    assert [row["completion"] for row in rows] == ["2", "3", "Hallo"]
    assert [row["version"] for row in rows] == [3, 2, 3]


def test_a_function_that_does_not_apply_is_null(run_dir: RunDirectory, groups: list[ScoredGroup]) -> None:
    started(run_dir).report_completions(1, groups)
    table = pq.read_table(completions_path(run_dir, 1))
    assert table.column("rewards/style").to_pylist() == [0.5, None, 0.25]
    assert table.column("rewards/style").null_count == 1


def test_a_chat_prompt_is_json(run_dir: RunDirectory, groups: list[ScoredGroup]) -> None:
    started(run_dir).report_completions(1, groups)
    prompt = pq.read_table(completions_path(run_dir, 1)).column("prompt").to_pylist()[2]
    assert json.loads(prompt) == [{"role": "user", "content": "Grüße?"}]
    assert "Grüße" in prompt


def test_groups_without_a_function_get_null_for_it(run_dir: RunDirectory, groups: list[ScoredGroup]) -> None:
    alone = replace(groups[0], rewards_by_function={"reward": groups[0].rewards})
    started(run_dir).report_completions(1, [alone, groups[1]])
    assert pq.read_table(completions_path(run_dir, 1)).column("rewards/style").to_pylist() == [None, None, 0.25]


def test_advantages_go_to_their_completions(run_dir: RunDirectory, groups: list[ScoredGroup]) -> None:
    nan = float("nan")
    advantages, values = [[0.5, 1.5], [nan] * 4, [1, 2, 3, 4, 5, -6]], [[0.25, 0.5], [nan] * 4, [0, 0, 0, 0, 0, 1]]
    started(run_dir).report_completions(1, groups, estimates(advantages, values))
    rows = pq.read_table(completions_path(run_dir, 1)).to_pylist()
    # The second was left out of the loss.
    assert [row["advantages"] for row in rows] == [[0.5, 1.5], None, [1, 2, 3, 4, 5, -6]]
    assert [row["values"] for row in rows] == [[0.25, 0.5], None, [0, 0, 0, 0, 0, 1]]


def test_first_tokens_that_were_left_out_of_the_loss_have_no_advantage(
    run_dir: RunDirectory, groups: list[ScoredGroup]
) -> None:
    nan = float("nan")
    advantages = [[nan, 1.5], [nan], [5, nan, nan, nan, nan, -6]]
    started(run_dir).report_completions(1, groups, estimates(advantages))

    rows = pq.read_table(completions_path(run_dir, 1)).to_pylist()
    assert [row["advantages"] for row in rows] == [[None, 1.5], None, [5, None, None, None, None, -6]]
    assert [row["values"] for row in rows] == [None, None, None]


def test_advantages_of_other_completions_are_an_error(run_dir: RunDirectory, groups: list[ScoredGroup]) -> None:
    with pytest.raises(ValueError, match="estimates of 1 sequences, but the trajectories have 3"):
        started(run_dir).report_completions(1, groups, estimates([[0.0, 0.0]]))
    assert list(run_dir.completions.iterdir()) == []


def test_texts_of_tokens_are_null_where_they_are_not_the_text(run_dir: RunDirectory, groups: list[ScoredGroup]) -> None:
    tidied = replace(groups[0], texts=("2", "three"))
    started(run_dir).report_completions(1, [tidied])
    table = pq.read_table(completions_path(run_dir, 1))
    assert table.column("token_texts").to_pylist() == [["2", ""], None]
    assert table.column("token_ids").to_pylist()[1] == [ord("3"), EOS_TOKEN_ID]


def test_a_token_in_no_version_span_has_no_version(run_dir: RunDirectory, groups: list[ScoredGroup]) -> None:
    group = groups[1].group
    (completion,) = group.trajectories
    known = replace(completion, version_spans=(VersionSpan(version=5, start=1, end=3),))
    started(run_dir).report_completions(1, [replace(groups[1], group=replace(group, trajectories=(known,)))])
    versions = pq.read_table(completions_path(run_dir, 1)).column("token_versions").to_pylist()
    assert versions == [[None, 5, 5, None, None, None]]


def test_what_functions_log_is_a_column(run_dir: RunDirectory, groups: list[ScoredGroup]) -> None:
    logging = [
        replace(groups[0], extras={"judge/note": ("good", None), "judge/score": (1, 0.5), "judge/mixed": ("a", 1)}),
        groups[1],
    ]
    started(run_dir).report_completions(1, logging)
    table = pq.read_table(completions_path(run_dir, 1))
    assert table.column("extra/judge/note").to_pylist() == ["good", None, None]
    assert table.column("extra/judge/score").to_pylist() == [1.0, 0.5, None]
    assert table.column("extra/judge/mixed").to_pylist() == ["a", "1", None]


def rows_of(run_dir: RunDirectory, group: ScoredGroup, advantages: list[list[float]] | None = None) -> list[Any]:
    given = None if advantages is None else estimates(advantages)
    started(run_dir).report_completions(1, [group], given)
    return list(pq.read_table(completions_path(run_dir, 1)).to_pylist())


def test_a_trajectory_of_texts(run_dir: RunDirectory) -> None:
    nan = float("nan")
    (row,) = rows_of(run_dir, tries(), [[1.0, nan, nan, 2.0]])
    assert row["environment"] == "guess"
    assert (row["num_tokens"], row["num_turns"], row["version"]) == (4, 2, 3)
    assert row["token_texts"] == ["4", "n", "o", "7"]
    assert row["sampled"] == [True, False, False, True]
    assert row["turn"] == [0, 0, 0, 1]
    assert row["sampling_logprobs"] == [-0.5, None, None, -0.25]
    assert row["token_versions"] == [3, None, None, 4]
    assert row["advantages"] == [1.0, None, None, 2.0]
    assert row["turn_rewards"] == [-0.5, 1.0]
    # A text is observed as a user's message, but it is no chat.
    assert row["messages"] is row["message_turns"] is None


def test_a_chat_with_tools_has_its_messages(run_dir: RunDirectory) -> None:
    (row,) = rows_of(run_dir, tool_chat(arguments='{"sum": "37+58 Grüße \ud800"}'))
    messages = json.loads(row["messages"])
    assert [message["role"] for message in messages] == ["assistant", "tool", "assistant"]
    assert row["message_turns"] == [0, 0, 1]
    assert messages[0]["tool_calls"][0]["function"]["arguments"] == '{"sum": "37+58 Grüße \ud800"}'
    assert "Grüße" in row["messages"]


def test_further_sequences_follow_in_the_same_lists(run_dir: RunDirectory) -> None:
    group = tries(further=("ab", "c"))
    nan = float("nan")
    (row,) = rows_of(run_dir, group, [[1.0, nan, nan, 2.0], [3.0, 4.0], [nan]])
    assert "".join(row["token_texts"]) == "4no7abc"
    assert row["sequence"] == [0, 0, 0, 0, 1, 1, 2]
    assert row["turn"] == [0, 0, 0, 1, 2, 2, 3]
    assert row["sampled"] == [True, False, False, True, True, True, True]
    assert row["turn_rewards"] == [-0.5, 1.0, 0.25, 0.25]
    assert row["further_prompts"] == [[1, 2, 3], [1, 2, 3]]
    assert row["advantages"] == [1.0, None, None, 2.0, 3.0, 4.0, None]
    # The oldest of all sequences.
    assert row["version"] == 2


def test_advantages_are_joined_by_trajectory(run_dir: RunDirectory) -> None:
    one, other = tries(further=("ab",)), tries()
    both = replace(one.group, trajectories=one.group.trajectories + other.group.trajectories)
    two = np.zeros(2, dtype=np.float32)
    group = replace(one, group=both, rewards=two, rewards_by_function={"guess": two}, texts=one.texts * 2)
    rows = rows_of(run_dir, group, [[1.0] * 4, [2.0] * 2, [3.0] * 4])
    assert [row["advantages"] for row in rows] == [[1, 1, 1, 1, 2, 2], [3, 3, 3, 3]]
    with pytest.raises(ValueError, match="estimates of 2 sequences, but the trajectories have 3"):
        rows_of(run_dir, group, [[1.0] * 4, [2.0] * 2])
