"""Parts that are stopped whatever the others do, and none that is forgotten where a start fails."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_ray import PPOConfig
from rlhf_ray.algorithm import start as module
from rlhf_ray.algorithm.run_plan import choose_device, learner_spec
from rlhf_ray.algorithm.start import Parts, start_parts
from rlhf_ray.config.plugins import advantage_plugin, loss_plugin
from rlhf_ray.config.settings import Settings
from rlhf_ray.errors import ConfigError, RolloutError
from rlhf_ray.rollouts.rollouter import SingleTurn
from rlhf_ray.types import Device

ENDS = ["weight_sync", "controller", "prompts", "rewards", "environments", "app", "learners", "session"]


class Part:
    """Writes down what is done to it; fails where it is told to."""

    def __init__(self, name: str, calls: list[str], fails: dict[str, BaseException]) -> None:
        self._name = name
        self._calls = calls
        self._fails = fails
        self.name = self.bridge = self.handle = self.restore_restarted_ranks = None
        self.num_rows = 1
        for method in ("start", "wait_placed", "wait_ready", "open", "close", "stop"):
            setattr(self, method, self._noting(method))

    def _noting(self, method: str) -> Callable[[], None]:
        def call(*_: Any, **__: Any) -> None:
            self._calls.append(f"{self._name}.{method}")
            if (error := self._fails.get(f"{self._name}.{method}")) is not None:
                raise error

        return call


def all_parts(calls: list[str], fails: dict[str, BaseException]) -> dict[str, Any]:
    return {name: Part(name, calls, fails) for name in ENDS}


@pytest.mark.parametrize("error", [TimeoutError("late"), KeyboardInterrupt()])
@pytest.mark.parametrize("failing", [*ENDS, "all"])
def test_every_part_is_stopped_whatever_another_one_raises(failing: str, error: BaseException) -> None:
    calls: list[str] = []
    ends = [f"{name}.{'close' if name == 'prompts' else 'stop'}" for name in ENDS]
    fails = {end: error for end in ends if failing in (end.partition(".")[0], "all")}
    try:
        Parts(**all_parts(calls, fails)).stop()
    except KeyboardInterrupt:
        assert isinstance(error, KeyboardInterrupt)
    assert calls == ends


@pytest.mark.parametrize(
    "failing",
    [
        "_rollout_app",
        "RewardPool",
        "learners.start",
        "app.start",
        "prompts.open",
        "learners.wait_ready",
        "app.wait_ready",
        "rewards.start",
        "_environment_pool",
        "environments.start",
        "RolloutFlow",
        "WeightSyncScheduler",
    ],
)
def test_a_start_that_fails_raises_the_cause_and_stops_what_was_made(
    failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    # No stop works, and yet all are called.
    fails: dict[str, BaseException] = {f"{name}.stop": TimeoutError("not deleted after 60s") for name in ENDS}
    parts = all_parts(calls, fails | {failing: RolloutError("the cause")})
    made = {
        "_learner_group": "learners",
        "_rollout_app": "app",
        "RewardPool": "rewards",
        "_environment_pool": "environments",
    }

    def maker(function: str, name: str) -> Callable[..., Any]:
        def make(*_: Any, **__: Any) -> Any:
            if function == failing:
                raise RolloutError("the cause")
            calls.append(f"{name}.made")
            return parts[name]

        return make

    for function, name in made.items():
        monkeypatch.setattr(module, function, maker(function, name))
    if failing in ("RolloutFlow", "WeightSyncScheduler"):
        monkeypatch.setattr(module, failing, maker(failing, ""))
    parts["app"].handle = SimpleNamespace(
        options=lambda **_: SimpleNamespace(generate=SimpleNamespace(remote=None)),
    )
    monkeypatch.setattr(module, "_portable_tokenizer", lambda *_: None)
    inputs: Any = SimpleNamespace(
        prompts=parts["prompts"],
        tokenizer_path="",
        advantage=SimpleNamespace(needs_greedy_rewards=False),
        environments=(),
        max_prompt_tokens=8,
    )
    session: Any = SimpleNamespace(ends_ray=True, begun=lambda *_: None, started=lambda: None)
    device = SimpleNamespace(on_gpu=False, colocated=False)
    plan: Any = SimpleNamespace(
        placement=SimpleNamespace(device=device, shares=SimpleNamespace(reward_worker=0.1)),
        engine=SimpleNamespace(weight_transfer="shared_memory"),
    )
    directory: Any = SimpleNamespace(ray_name="run")

    with pytest.raises(RolloutError, match="the cause"):
        start_parts(Settings(), inputs, plan, session, directory, lambda text: None, SingleTurn())

    there = [call.removesuffix(".made") for call in calls if call.endswith(".made")]
    assert there
    for name in there:
        assert f"{name}.stop" in calls
    assert "prompts.close" in calls
    if "rewards.start" in calls:  # Its models may take GPUs of the node that learners need to be on together.
        assert "learners.wait_placed" in calls[: calls.index("rewards.start")]


@pytest.mark.parametrize("in_turn", [True, False])
def test_the_time_of_engines_that_wait_for_learners_begins_after_these(in_turn: bool) -> None:
    calls: list[str] = []
    app_waits = threading.Event()

    def wait_for_learners() -> None:
        assert app_waits.wait(0.2 if in_turn else 10.0) is not in_turn
        calls.append("learners")

    def wait_for_app() -> None:
        app_waits.set()
        calls.append("app")

    learners: Any = SimpleNamespace(wait_ready=wait_for_learners, wait_placed=lambda stopped: None)
    app: Any = SimpleNamespace(wait_ready=wait_for_app)
    rewards: Any = SimpleNamespace(start=lambda: None)
    module._wait(learners, app, rewards, None, lambda text: None, in_turn=in_turn)
    assert sorted(calls) == ["app", "learners"]
    assert not in_turn or calls == ["learners", "app"]


@pytest.mark.parametrize(
    ("changes", "off_policy"),
    [
        ({}, False),
        ({"rollouts.max_staleness": 1}, True),
        ({"rollouts.quantization": "fp8"}, True),
        ({"rollouts.engine_args": {"kv_cache_dtype": "fp8"}}, True),
        ({"rollouts.engine_args": {"quantization_config": {"linear": {"weight": "mxfp8"}}}}, True),
        ({"rollouts.engine_args": {"kv_cache_dtype": "auto", "max_num_seqs": 8}}, False),
    ],
)
def test_learners_correct_wherever_another_policy_samples(changes: dict[str, Any], off_policy: bool) -> None:
    inputs: Any = SimpleNamespace(
        policy_path="policy",
        critic_path=None,
        reference_path=None,
        advantage=advantage_plugin("gae", {}),
        loss=loss_plugin("ppo", {}),
    )
    device = Device(on_gpu=True, learners_on_gpu=True, colocated=False, dtype="bfloat16")

    spec = learner_spec(PPOConfig.from_dict(changes).settings, inputs, device)

    assert spec.rollouts.is_off_policy == off_policy
    assert spec.weight_transfer == "nccl"
    assert spec.compute_dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kernel", "dtype", "on_gpu", "remedy"),
    [
        ("flash_attention_2", "auto", False, "needs learners on GPUs"),
        ("flex_attention", "auto", False, "needs learners on GPUs"),
        ("flash_attention_3", "float32", True, "no float32 kernel"),
    ],
)
def test_an_attention_that_the_learners_cannot_compute_is_refused_when_their_device_is_known(
    kernel: str, dtype: str, on_gpu: bool, remedy: str
) -> None:
    config = PPOConfig().model(attn_implementation=kernel, dtype=dtype)
    settings = config.resources(device="cuda" if on_gpu else "cpu").settings
    device = choose_device(settings, 8.0 if on_gpu else 0.0)

    with pytest.raises(ConfigError, match=remedy) as caught:
        learner_spec(settings, SimpleNamespace(), device)  # type: ignore[arg-type]
    assert caught.value.field == "model.attn_implementation"
