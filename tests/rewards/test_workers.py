from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.settings import RewardSettings
from rlhf_ray.errors import ConfigError
from rlhf_ray.pickling import serialize
from rlhf_ray.prompts import tokenizer
from rlhf_ray.quickstart import model_path
from rlhf_ray.rewards import exact_match, resolve_rewards
from rlhf_ray.rewards.arguments import TrainerState
from rlhf_ray.rewards.scoring import Scores, ScoringError
from rlhf_ray.rewards.workers import SequentialRewardWorker, load_tokenizer
from rlhf_ray.types import RolloutGroup


def test_a_path_is_loaded_where_all_tokenizers_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Path(model_path()).parent
    monkeypatch.setenv("HOME", str(home))
    assert load_tokenizer(model_path(), False) is tokenizer.load_tokenizer(model_path(), trust_remote_code=False)
    # The folder as a setting may name it, and one that is not there.
    loaded = load_tokenizer(f"~/{Path(model_path()).name}", False)
    assert loaded.decode(tokenizer.load_tokenizer(model_path())("1+1=")["input_ids"]) == "1+1="
    with pytest.raises(ConfigError, match="there is no such folder"):
        load_tokenizer(str(tmp_path / "nowhere"), False)


def test_a_tokenizer_that_was_sent_is_deserialized() -> None:
    own = tokenizer.load_tokenizer(model_path())
    sent = serialize(own, defined_by=own)
    assert load_tokenizer(sent, False).decode([49, 43]) == "1+"


def test_a_hostile_completion_and_an_unreadable_answer_fail_their_own_groups(
    tokenizer: Any, group_of: Callable[..., RolloutGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_ray.rewards.workers.LONG_CALL_S", 60.0)
    reward = exact_match(pattern=r"<a>(.*?)</a>", timeout_s=0.2)
    payloads = [reward.serialized() for reward in resolve_rewards(RewardSettings(functions=[reward]))]
    worker = SequentialRewardWorker(payloads, serialize(tokenizer, defined_by=tokenizer), False)
    groups = [
        group_of(["<a>12</a>"], group_id=1, answer=["12", "13"]),
        group_of(["<a>12</a>", "<a>" * 30_000], group_id=2, answer="12"),
        group_of(["<a>12</a>"], group_id=3, answer={"ground_truth": "12"}),
        group_of(["<a>12</a>", "12"], group_id=4, answer=12.0),
    ]
    good, late, unreadable, last = worker.work([(group, TrainerState()) for group in groups])
    assert isinstance(good, Scores)
    assert isinstance(last, Scores)
    assert [one.values["exact_match"].tolist() for one in (good, last)] == [[1.0], [1.0, 0.0]]
    assert isinstance(late, ScoringError)
    assert isinstance(unreadable, ScoringError)
    assert late.kind == unreadable.kind == "raised"
    assert "exact_match.pattern takes more than 0.2 s" in late.message
    assert "the row's 'answer' is a mapping" in unreadable.message
