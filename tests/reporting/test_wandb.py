from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.settings import ReportingSettings, Settings
from rlhf_ray.errors import ConfigError
from rlhf_ray.reporting import RunDirectory, flatten
from rlhf_ray.reporting.wandb import WandbReporter
from rlhf_ray.types import ScoredGroup


def asking_for(mode: str) -> Settings:
    return Settings(reporting=ReportingSettings(wandb_project="test", wandb_mode=mode))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's own W&B settings out of the test, and the test out of them."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))


def written(path: Path, expected: bytes, timeout_s: float = 20.0) -> bytes:
    """Read a file that W&B's own process may still be writing."""
    deadline = time.monotonic() + timeout_s
    while expected not in (stored := path.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert expected in stored
    return stored


def test_an_offline_run_lies_in_the_run_directory(run_dir: RunDirectory, result: dict[str, Any]) -> None:
    reporter = WandbReporter(asking_for("offline"), run_dir)
    reporter.report(flatten(result))
    reporter.stop()
    runs = list(run_dir.wandb.glob("offline-run-*"))
    assert len(runs) == 1
    stored = written(next(runs[0].glob("*.wandb")), b"openai/gsm8k/reward_mean")
    assert b"rollouts/reward_mean" in stored
    assert b"lr" in stored  # the configuration


def test_online_without_a_key_is_refused_not_asked(run_dir: RunDirectory) -> None:
    with pytest.raises(ConfigError, match="wandb login") as caught:
        WandbReporter(asking_for("online"), run_dir)
    assert caught.value.field == "reporting.wandb_mode"


def test_completions_are_a_table_of_the_same_step(
    run_dir: RunDirectory, result: dict[str, Any], groups: list[ScoredGroup]
) -> None:
    reporter = WandbReporter(asking_for("offline"), run_dir)
    logging = replace(groups[0], extras={"judge/note": ("good", 3)})
    reporter.report_completions(3, [logging, *groups[1:]])
    reporter.report(flatten(result))
    reporter.stop()
    (table,) = run_dir.wandb.rglob("completions_*.table.json")
    stored = json.loads(table.read_text(encoding="utf-8"))
    assert stored["columns"] == ["prompt", "completion", "reward", "finish_reason", "extra/judge/note"]
    assert [row[4] for row in stored["data"]] == ["good", 3, None]
    assert [row[:3] for row in stored["data"]] == [
        ["1+1=", "2", 1.0],
        ["1+1=", "3", 0.0],
        ['[{"role": "user", "content": "Grüße?"}]', "Hallo", 0.25],
    ]
