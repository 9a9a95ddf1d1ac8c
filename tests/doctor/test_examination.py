from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rlhf_ray.config.settings import DataSettings, ModelSettings, RewardSettings, RolloutSettings, Settings
from rlhf_ray.doctor import examination
from rlhf_ray.doctor.check import Check
from rlhf_ray.doctor.examination import checks, examine, table
from rlhf_ray.doctor.machine import Machine

FOUND = [
    Check("python", "ok", "3.11.7"),
    Check("/dev/shm", "warn", "64 MiB", "start the container with --shm-size=2g"),
    Check("model.path", "fail", "no such folder: " + "deep/" * 30, "give a model folder"),
]


def printed(found: list[Check]) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=80).print(table(found))
    return file.getvalue().splitlines()


def test_the_table_fits_and_puts_remedies_below() -> None:
    lines = printed(FOUND)
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["python", "ok", "3.11.7"]
    shm = next(number for number, line in enumerate(lines) if line.startswith("/dev/shm"))
    assert lines[shm + 1].strip() == "-> start the container with --shm-size=2g"
    assert "".join(line.strip() for line in lines).count("deep/") == 30  # folded, not cut


@pytest.mark.parametrize(("found", "code"), [(FOUND[:1], 0), (FOUND[:2], 0), (FOUND, 1)])
def test_the_exit_code_is_that_of_failures(monkeypatch: pytest.MonkeyPatch, found: list[Check], code: int) -> None:
    monkeypatch.setattr(examination, "checks", lambda settings, **_: iter(found))
    file = io.StringIO()
    assert examine(Settings(), console=Console(file=file, width=80)) == code
    assert ("1 failed" in file.getvalue()) == (code == 1)


@pytest.fixture
def surroundings(monkeypatch: pytest.MonkeyPatch, machine: Callable[..., Machine]) -> None:
    """Pretend a Ray that starts and a machine without GPUs, whatever this one is."""
    monkeypatch.setattr(examination, "check_ray", lambda settings: Check("Ray", "ok", "pretended"))
    monkeypatch.setattr(examination.Machine, "here", machine)


def settings(tmp_path: Path, model: Path, **rollouts: Any) -> Settings:
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps({"prompt": "1+1=", "answer": "2"}) + "\n")
    return Settings(
        model=ModelSettings(path=str(model)),
        data=DataSettings(path=str(data)),
        rewards=RewardSettings(functions=[lambda completions, **_: [0.0] * len(completions)]),
        rollouts=RolloutSettings(**{"max_new_tokens": 8, **rollouts}),
    )


def by_name(found: Iterator[Check]) -> dict[str, Check]:
    return {check.name: check for check in found}


def test_a_run_that_can_start_passes(tmp_path: Path, model_folder: Path, surroundings: None) -> None:
    found = by_name(checks(settings(tmp_path, model_folder), skip_engine=True))
    of_the_run = ("machine", "GPUs", "Ray", "model.path", "data, rewards", "disk", "/dev/shm", "memory")
    assert {name: found[name].status for name in of_the_run} == dict.fromkeys(of_the_run, "ok")
    assert {"python", "ray", "torch", "vllm", "torchvision", "ulimit -n"} <= found.keys()
    assert "vLLM engine" not in found


def test_a_missing_model_ends_what_depends_on_it(tmp_path: Path, surroundings: None) -> None:
    found = by_name(checks(settings(tmp_path, tmp_path / "nowhere"), skip_engine=False))
    assert found["model.path"].status == "fail"
    assert found["memory, engine"].status == "warn"
    assert "vLLM engine" not in found


def test_wrong_data_is_found_and_the_rest_still_looked_at(
    tmp_path: Path, model_folder: Path, surroundings: None
) -> None:
    run = settings(tmp_path, model_folder)
    Path(str(run.data.path)).write_text(json.dumps({"question": "1+1="}) + "\n")
    found = by_name(checks(run, skip_engine=True))
    assert found["data"].status == "fail"
    assert "prompt" in found["data"].detail
    assert "disk" in found


def test_columns_that_do_not_fit_the_rewards_are_found(tmp_path: Path, model_folder: Path, surroundings: None) -> None:
    def grade(completions: Any, answer: Any, scale: Any) -> list[float]:
        return [scale] * len(completions)

    def detail_with(row: dict[str, Any]) -> str:
        functions = RewardSettings(functions=[functools.partial(grade, scale=2.0)])
        run = replace(settings(tmp_path, model_folder), rewards=functions)
        Path(str(run.data.path)).write_text(json.dumps({"prompt": "1+1="} | row) + "\n")
        found = by_name(checks(run, skip_engine=True))["data"]
        return found.detail if found.status == "fail" else found.status

    assert "'grade' needs the column 'answer'" in detail_with({"gold": "2"})
    assert "'grade' is given 'scale' in rewards.functions" in detail_with({"answer": "2", "scale": 3})


def test_lengths_that_do_not_fit_the_context_are_found(tmp_path: Path, model_folder: Path, surroundings: None) -> None:
    found = by_name(checks(settings(tmp_path, model_folder, max_new_tokens=128), skip_engine=True))
    assert found["rollouts.max_new_tokens"].status == "fail"


def test_the_engine_is_started_with_a_replica_s_arguments(
    tmp_path: Path, model_folder: Path, surroundings: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def start(spec: Any, *, timeout_s: float) -> Check:
        asked.append((spec.engine_args["model"], spec.engine_args["max_model_len"], timeout_s))
        return Check("vLLM engine", "ok", "pretended")

    monkeypatch.setattr(examination, "check_engine", start)
    run = settings(tmp_path, model_folder, max_prompt_tokens=40, max_new_tokens=8, startup_timeout_s=77.0)
    assert by_name(checks(run, skip_engine=False))["vLLM engine"].status == "ok"
    assert asked == [(str(model_folder), 48, 77.0)]


@pytest.mark.parametrize("transfer", ["auto", "ipc"])
def test_the_engine_of_a_gpu_that_a_learner_shares_is_started_as_it_will_be(
    tmp_path: Path,
    model_folder: Path,
    surroundings: None,
    transfer: str,
    machine: Callable[..., Machine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def start(spec: Any, *, timeout_s: float) -> Check:
        asked.append((spec.colocated, spec.engine_args["enable_sleep_mode"], spec.weight_transfer))
        return Check("vLLM engine", "ok", "pretended")

    monkeypatch.setattr(examination, "check_engine", start)
    monkeypatch.setattr(examination.Machine, "here", functools.partial(machine, gpus=1))
    run = settings(tmp_path, model_folder, max_prompt_tokens=40, weight_transfer=transfer)
    run = replace(run, resources=replace(run.resources, device="cuda"))
    found = by_name(checks(run, skip_engine=False))
    assert found["vLLM engine"].status == "ok"
    assert "learners" in found["memory"].detail
    assert asked == [(True, True, "ipc" if transfer == "ipc" else "shared_memory")]


def test_what_is_in_the_home_folder_reaches_the_engine_by_its_whole_name(
    tmp_path: Path, model_folder: Path, surroundings: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def start(spec: Any, *, timeout_s: float) -> Check:
        asked.append((spec.engine_args["model"], spec.engine_args["tokenizer"]))
        return Check("vLLM engine", "ok", "pretended")

    monkeypatch.setattr(examination, "check_engine", start)
    monkeypatch.setenv("HOME", str(model_folder.parent))
    run = settings(tmp_path, model_folder)
    path = f"~/{model_folder.name}"
    run = replace(run, model=ModelSettings(path=path, critic_path=path, tokenizer_path=path))
    found = by_name(checks(run, skip_engine=False))
    assert {found[name].status for name in ("model.path", "model.critic_path", "data, rewards")} == {"ok"}
    assert asked == [(str(model_folder), str(model_folder))]


def test_code_that_ships_with_a_critic_is_trusted_like_that_of_the_policy(
    tmp_path: Path, model_folder: Path, surroundings: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    trusted: dict[str, bool] = {}

    def read(field: str, path: str, *, trust_remote_code: bool = False, **_: Any) -> tuple[Check, None]:
        trusted[field] = trust_remote_code
        return Check(field, "fail", "pretended"), None

    monkeypatch.setattr(examination, "check_model", read)
    model = ModelSettings(path="owner/policy", critic_path="owner/critic", trust_remote_code=True)
    by_name(checks(replace(settings(tmp_path, model_folder), model=model), skip_engine=True))
    assert trusted == {"model.path": True, "model.critic_path": True}
