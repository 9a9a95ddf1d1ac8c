"""The examples without engines: what they configure, parse and compute. Real runs are in the integration tests."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from rlhf_ray import ConfigError, PPOConfig, cli
from rlhf_ray.rewards.functions import resolve_rewards
from rlhf_ray.rewards.registry import build_reward

EXAMPLES = Path(__file__).parents[2] / "examples"
YAML = EXAMPLES / "gsm8k_ppo.yaml"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gsm8k_ppo() -> ModuleType:
    return example("gsm8k_ppo")


@pytest.fixture(scope="module")
def custom_reward() -> ModuleType:
    return example("custom_reward")


@pytest.fixture(scope="module")
def ppo_reward_model() -> ModuleType:
    return example("ppo_reward_model")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all of a small model but its weights: the byte tokenizer and a context of 2,048."""
    from transformers import Qwen2Config

    from rlhf_ray.quickstart.tokenizer import EOS_TOKEN_ID, VOCAB_SIZE, build_tokenizer

    folder = tmp_path_factory.mktemp("model")
    build_tokenizer(max_length=2048).save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        eos_token_id=EOS_TOKEN_ID,
    )
    config.save_pretrained(folder)
    return folder


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    """GSM8K's columns and the lengths of its prompts."""
    path = tmp_path / "train.jsonl"
    rows = [
        {"question": f"How much is {n} and {n}? " * 15, "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(8)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


# --- gsm8k_ppo.yaml ---------------------------------------------------------------------------------------------------


def test_the_file_is_valid_as_it_is_and_uses_the_critic() -> None:
    config = PPOConfig.from_yaml(YAML).validate()
    assert config.settings.model.path == "Qwen/Qwen2.5-1.5B-Instruct"
    assert config.settings.training.critic_lr > config.settings.training.lr
    schedule = config.schedule()
    assert (schedule.completions, schedule.minibatch_sizes, schedule.optimizer_steps) == (256, (64,) * 4, 4)


def test_two_overrides_make_it_a_local_run_that_asks_no_hub(model: Path, problems: Path, no_hub: None) -> None:
    from rlhf_ray.algorithm.inputs import check_inputs
    from rlhf_ray.evaluation.evaluator import Evaluator

    config = cli.load_config(str(YAML), [f"data.path={problems}", f"model.path={model}"]).validate()
    inputs = check_inputs(config.settings)
    assert (inputs.policy_path, inputs.critic_path, inputs.tokenizer_path) == (str(model),) * 3
    assert inputs.max_prompt_tokens == 1024
    assert Evaluator(config.settings, inputs.held_out).metrics({}) == {}


def test_a_local_test_set_can_be_measured_on_the_way(model: Path, problems: Path, no_hub: None) -> None:
    from rlhf_ray.algorithm.inputs import check_inputs

    overrides = [f"data.path={problems}", f"data.eval_path={problems}", f"model.path={model}", "evaluation.interval=10"]
    config = cli.load_config(str(YAML), overrides).validate()
    check_inputs(config.settings)
    assert config.schedule().evaluations == 20


def test_prompts_are_chats_that_ask_for_the_marker_that_the_reward_reads() -> None:
    data = PPOConfig.from_yaml(YAML).settings.data
    assert (data.prompt_column, data.as_chat) == ("question", True)
    assert data.prompt_template is not None
    assert re.fullmatch(r"\{prompt\}\n\n[^\n]*####[^\n]*", data.prompt_template)


def test_its_reward_reads_the_datasets_answers() -> None:
    (spec,) = PPOConfig.from_yaml(YAML).settings.rewards.functions
    assert isinstance(spec, dict)
    reward = build_reward(spec["name"], {}, field="rewards.functions", value=spec)
    completions = [[{"role": "assistant", "content": text}] for text in ("3 + 4 = 7\n#### 7", "#### 8", "so it is 7")]
    assert reward(completions=completions, answer=["3 and 4 is <<3+4=7>>7\n#### 7"] * 3) == [1.0, 0.0, 0.0]


# --- gsm8k_ppo.py -----------------------------------------------------------------------------------------------------


def test_script_and_file_say_the_same(gsm8k_ppo: ModuleType) -> None:
    assert gsm8k_ppo.gsm8k() == PPOConfig.from_yaml(YAML)


def test_the_script_reads_its_command_line(gsm8k_ppo: ModuleType) -> None:
    args = gsm8k_ppo.parse(["--config", "conf.yaml", "training.lr=2e-6", "data.batch_size=8"])
    assert (args.config, args.overrides) == ("conf.yaml", ["training.lr=2e-6", "data.batch_size=8"])
    args = gsm8k_ppo.parse(["training.lr=2e-6", "--config", "conf.yaml"])
    assert (args.config, args.overrides) == ("conf.yaml", ["training.lr=2e-6"])
    with pytest.raises(SystemExit):
        gsm8k_ppo.parse(["--learning-rate", "1"])


def test_the_hubs_test_set_goes_with_the_hubs_training_set_alone(gsm8k_ppo: ModuleType) -> None:
    hub = gsm8k_ppo.with_test_set(gsm8k_ppo.gsm8k()).settings.data
    assert (hub.subset, hub.eval_path, hub.split, hub.eval_split) == ("main", "openai/gsm8k", "train", "test")
    local = gsm8k_ppo.with_test_set(gsm8k_ppo.gsm8k().data(path="train.jsonl")).settings.data
    assert local.eval_path is None


class FakeAlgorithm:
    """Counts; gets a tenth better an iteration."""

    built: list[FakeAlgorithm]
    fails = False

    def __init__(self, config: PPOConfig) -> None:
        self.settings = config.settings
        self.run_dir = Path("runs/fake")
        self.iteration = 0
        self.calls: list[str] = []
        type(self).built.append(self)

    def evaluate(self) -> dict[str, Any]:
        self.calls.append("evaluate")
        if self.settings.data.eval_path is None:
            return {}
        return {"gsm8k": {"reward_mean": self.iteration / 10, "num_prompts": 4}}

    def train(self) -> dict[str, Any]:
        self.calls.append("train")
        if self.fails:
            raise RuntimeError("no")
        self.iteration += 1
        return {
            "training_iteration": self.iteration,
            "rollouts": {"reward_mean": 0.25, "completion_tokens_mean": 12.0},
            "timers": {"iteration_s": 1.5},
        }

    def export_hf(self, path: Path) -> Path:
        self.calls.append("export")
        return path

    def stop(self) -> None:
        self.calls.append("stop")


@pytest.fixture
def algorithm(monkeypatch: pytest.MonkeyPatch) -> type[FakeAlgorithm]:
    fresh = type("Fake", (FakeAlgorithm,), {"built": []})
    monkeypatch.setattr(PPOConfig, "algorithm_class", fresh)
    return fresh


@pytest.mark.parametrize("source", [[], ["--config", str(YAML)]])
def test_the_script_measures_trains_measures_and_stops(
    gsm8k_ppo: ModuleType, algorithm: type[FakeAlgorithm], source: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    gsm8k_ppo.main([*source, "training.iterations=2", "training.lr=2e-6"])
    (algo,) = algorithm.built
    assert algo.calls == ["evaluate", "train", "train", "evaluate", "export", "stop"]
    assert algo.settings.training.lr == 2e-6
    assert capsys.readouterr().out.splitlines() == [
        "before training: 0.0% of 4 problems of gsm8k correct",
        "iteration 1: reward 0.250, 12 tokens per completion, 1.5 s",
        "iteration 2: reward 0.250, 12 tokens per completion, 1.5 s",
        "after training: 20.0% of 4 problems of gsm8k correct",
        f"trained model: {Path('runs/fake/model')}",
    ]


def test_the_script_says_so_without_a_test_set(
    gsm8k_ppo: ModuleType, algorithm: type[FakeAlgorithm], capsys: pytest.CaptureFixture[str]
) -> None:
    gsm8k_ppo.main(["training.iterations=1", "data.path=train.jsonl"])
    assert "before training: no held-out set; set data.eval_path" in capsys.readouterr().out


def test_the_script_stops_the_run_when_it_fails(gsm8k_ppo: ModuleType, algorithm: type[FakeAlgorithm]) -> None:
    algorithm.fails = True
    with pytest.raises(RuntimeError, match="no"):
        gsm8k_ppo.main([])
    assert algorithm.built[0].calls[-1] == "stop"


def test_the_script_refuses_a_wrong_setting_before_it_builds(
    gsm8k_ppo: ModuleType, algorithm: type[FakeAlgorithm]
) -> None:
    with pytest.raises(ConfigError, match=r"training\.lr"):
        gsm8k_ppo.main(["training.learning_rate=1"])
    assert algorithm.built == []


# --- custom_reward.py -------------------------------------------------------------------------------------------------


def test_the_custom_rewards_by_hand(custom_reward: ModuleType) -> None:
    # 132 is right; 122 is 10 away, half of the scale; 100 is more than the scale away; the last two are no numbers.
    completions, answer = ["132", "122", "100", "", "13x"], ["132"] * 5
    assert custom_reward.correct(completions=completions, answer=answer) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert custom_reward.near(scale=20)(completions=completions, answer=answer) == [1.0, 0.5, 0.0, None, None]


def test_the_custom_run_is_valid_and_its_functions_reach_the_workers(custom_reward: ModuleType) -> None:
    from rlhf_ray.pickling import deserialize

    config = custom_reward.config().validate()
    rewards = [deserialize(one.serialized()) for one in resolve_rewards(config.settings.rewards)]
    assert [(reward.name, reward.weight) for reward in rewards] == [("correct", 1.0), ("near", 0.2)]
    arguments = {"prompts": ["1+1="], "completions": ["3"], "completion_ids": [[51]], "answer": ["2"]}
    assert [reward.function(**arguments) for reward in rewards] == [[0.0], [0.95]]
    assert config.settings.data.path is None


def test_accuracy_is_of_the_one_function_and_leaves_failures_out(custom_reward: ModuleType) -> None:
    import numpy as np

    from rlhf_ray.types import Prompt, RewardFailure, RolloutGroup, ScoredGroup

    def scored(correct: float) -> ScoredGroup:
        prompt = Prompt(prompt_id=0, token_ids=np.zeros(1, np.int32), text="1+1=")
        return ScoredGroup(
            group=RolloutGroup(group_id=0, prompt=prompt, trajectories=(), replica_id="r"),
            rewards=np.full(1, 0.7, np.float32),
            rewards_by_function={"correct": np.full(1, correct, np.float32), "near": np.full(1, 0.9, np.float32)},
            texts=("",),
            reward_s=0.0,
        )

    class Evaluated:
        def sample_evaluation(self) -> tuple[ScoredGroup | RewardFailure, ...]:
            return scored(1.0), scored(0.0), RewardFailure(group_id=2, kind="raised", message=""), scored(1.0)

    assert custom_reward.accuracy(Evaluated()) == pytest.approx(2 / 3)


# --- ppo_reward_model.py ----------------------------------------------------------------------------------------------


def test_preferences_are_those_of_the_checker(ppo_reward_model: ModuleType) -> None:
    import random

    from rlhf_ray.quickstart.task import train_rows

    rows = train_rows()[:50]
    right = {row["prompt"] + row["answer"] for row in rows}
    pairs = list(itertools.islice(ppo_reward_model.preferences(rows, random.Random(0)), 300))
    assert all(better in right and worse not in right for better, worse in pairs)
    assert all(better.partition("=")[0] == worse.partition("=")[0] for better, worse in pairs)
    # Worse answers have every length: one digit less, the same and one more.
    assert {len(worse) - len(better) for better, worse in pairs} == {-1, 0, 1}


def test_the_reward_model_that_the_example_trains_is_one_that_a_run_takes(
    ppo_reward_model: ModuleType, tmp_path: Path
) -> None:
    from rlhf_ray.rewards.reward_model.check import check_reward_model

    assert 0.0 <= ppo_reward_model.train_reward_model(tmp_path, steps=2) <= 1.0
    config = ppo_reward_model.config(tmp_path).validate()
    model, checker = resolve_rewards(config.settings.rewards)
    assert [(one.name, one.weight) for one in (model, checker)] == [("reward_model", 1.0), ("correct", 0.0)]
    check_reward_model(model.function, "rewards.functions[0]")
    scores = model.function(
        prompts=["1+1="] * 2, completions=["2", "three"], completion_ids=[[1], [2]], answer=["2"] * 2
    )
    assert all(isinstance(score, float) for score in scores)


# --- tune_sweep.py ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tune_sweep() -> ModuleType:
    return example("tune_sweep")


class Grid(list[Any]):
    """Two trials that ended, the better one second, and one that failed."""

    experiment_path = ""

    def __init__(self, folder: Path) -> None:
        import pandas as pd

        key = "evaluation/quickstart/reward_mean"

        def trial(lr: float, accuracies: list[float]) -> Any:
            iterations = range(1, len(accuracies) + 1)
            return SimpleNamespace(
                error=None,
                path=f"/sweep/{lr}",
                config={"training": {"lr": lr}, "evaluation": {"interval": 1}},
                metrics={
                    "training_iteration": len(accuracies),
                    "evaluation": {"quickstart": {"reward_mean": accuracies[-1]}},
                },
                metrics_dataframe=pd.DataFrame({"training_iteration": iterations, key: accuracies}),
            )

        failed = SimpleNamespace(
            error=RuntimeError("no"),
            path="/sweep/x",
            config={"training": {"lr": 1.0}},
            metrics={},
            metrics_dataframe=None,
        )
        super().__init__([trial(2e-5, [0.4, 0.45]), trial(1e-3, [0.4, 0.5, 0.75]), failed])
        self.experiment_path = str(folder)

    def get_best_result(self) -> Any:
        return self[1]


def test_the_sweep_draws_learning_rates_and_evaluates_before_the_first_stop(tune_sweep: ModuleType) -> None:
    args = tune_sweep.parse(["--trials", "3", "--iterations", "12"])
    config = PPOConfig.from_dict(tune_sweep.space(args))
    assert all(2e-5 <= config.settings.training.lr.sample() <= 2e-3 for _ in range(20))  # type: ignore[attr-defined]
    resolved = config.training(lr=1e-4).validate()
    assert (resolved.schedule().evaluations, args.trials, args.concurrent) == (6, 3, 1)


def test_the_sweep_tells_of_each_evaluation(tune_sweep: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    class Trial:
        config: ClassVar[dict[str, Any]] = {"training": {"lr": 3e-4}, "evaluation": {"interval": 3}}

        def __str__(self) -> str:
            return "PPO_1"

    progress = tune_sweep.Progress()
    for number in range(1, 5):
        result = {"training_iteration": number, "evaluation": {"quickstart": {"reward_mean": 0.5}}}
        progress.on_trial_result(number, [], Trial(), result)
    progress.on_trial_complete(4, [], Trial())
    assert capsys.readouterr().out.splitlines() == [
        "PPO_1: learning rate 3.00e-04, iteration   3, accuracy 50.0%",
        "PPO_1: ended",
    ]


def test_the_sweep_prints_a_table_and_draws_a_plot(
    tune_sweep: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune_sweep, "sweep", lambda args: Grid(tmp_path))
    tune_sweep.main([])
    assert capsys.readouterr().out.splitlines() == [
        "learning rate   iterations     final accuracy   folder",
        "     1.00e-03            3              75.0%   /sweep/0.001",
        "     2.00e-05            2              45.0%   /sweep/2e-05",
        "1 trials failed",
        f"plot: {tmp_path / 'sweep.png'}",
        "best run: /sweep/0.001",
    ]
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


# --- custom_training_step.py ------------------------------------------------------------------------------------------


def test_a_custom_step_trains_on_rewards_less_the_cost_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_ray.types import Prompt, RolloutGroup, ScoredGroup, Trajectory

    module = example("custom_training_step")
    trajectories = tuple(
        Trajectory.single_turn(
            token_ids=np.zeros(length, dtype=np.int32),
            sampling_logprobs=np.zeros(length, dtype=np.float32),
            version_spans=(),
            asked_version=0,
            finish_reason="stop",
        )
        for length in (1, 3)
    )
    prompt = Prompt(prompt_id=0, token_ids=np.zeros(1, dtype=np.int32), text="")
    group = RolloutGroup(group_id=0, prompt=prompt, trajectories=trajectories, replica_id="r")
    rewards = np.asarray([1.0, 0.0], dtype=np.float32)
    scored = ScoredGroup(group=group, rewards=rewards, rewards_by_function={}, texts=("", ""), reward_s=0.0)
    trained: list[Any] = []
    answers = {
        "collect": lambda self: SimpleNamespace(groups=(scored,)),
        "make_batch": lambda self, groups: groups,
        "update": lambda self, groups: trained.append(groups[0].rewards.tolist()),
        "publish": lambda self: None,
        "result": lambda self: {"timers": {}},
    }
    for name, answer in answers.items():
        monkeypatch.setattr(module.BriefPPO, name, answer)

    result = object.__new__(module.BriefPPO).training_step()

    assert trained == [pytest.approx([0.98, -0.06])]
    assert result == {"timers": {}, "brief": {"cost_mean": pytest.approx(0.04)}}
    assert rewards.tolist() == [1.0, 0.0]
