from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_ray import cli
from rlhf_ray.algorithms.ppo import PPOConfig
from rlhf_ray.config.builder import AlgorithmConfig
from rlhf_ray.config.settings import Settings
from rlhf_ray.errors import ConfigError, DataError, LearnerError, RewardError
from rlhf_ray.reporting import RunDirectory
from rlhf_ray.reporting.completions import CompletionsReporter
from rlhf_ray.reporting.report import DEFAULT_TABLES
from rlhf_ray.types import ScoredGroup


class FakeAlgorithm:
    """Stands where the algorithm stands: counts, writes the run directory, learns one point an iteration."""

    built: list[FakeAlgorithm]
    error: BaseException | None

    def __init__(self, config: PPOConfig) -> None:
        self.config = config
        self.settings: Settings = config.settings
        goes_on = self.settings.checkpointing.resume != "never"
        run_dir = self.settings.reporting.run_dir
        directory = RunDirectory.reopen(run_dir) if goes_on else RunDirectory.create(run_dir, algorithm="PPO")
        directory.write_config(config.to_yaml())
        self.directory = directory
        self.run_dir: Path = directory.path
        self.iteration = 0
        self.restored: str | None = None
        self.stopped = 0
        type(self).built.append(self)

    @classmethod
    def from_checkpoint(cls, path: str, config: PPOConfig) -> FakeAlgorithm:
        algorithm = cls(config)
        algorithm.restored = path
        return algorithm

    def train(self) -> dict[str, Any]:
        if self.error is not None and self.iteration == 1:
            raise self.error
        self.iteration += 1
        result: dict[str, Any] = {
            "training_iteration": self.iteration,
            "rollouts": {"reward_mean": self.iteration / 10},
        }
        if self.settings.evaluation.interval and self.iteration % self.settings.evaluation.interval == 0:
            result["evaluation"] = self.evaluate()
        return result

    def evaluate(self) -> dict[str, Any]:
        return {"held-out": {"reward_mean": 0.4 + self.iteration / 100}}

    def export_hf(self, path: str) -> None:
        Path(path).mkdir()

    def stop(self) -> None:
        self.stopped += 1


@pytest.fixture
def algorithm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[FakeAlgorithm]:
    """Let PPO be the fake, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    fresh = type("Fake", (FakeAlgorithm,), {"built": [], "error": None})
    monkeypatch.setattr(PPOConfig, "algorithm_class", fresh)
    return fresh


def test_train_runs_all_iterations_exports_stops_and_sums_up(
    algorithm: type[FakeAlgorithm], capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(["train", "training.iterations=3", "evaluation.interval=3", "--run-dir", "here"])
    assert code == 0
    (algo,) = algorithm.built
    assert (algo.iteration, algo.stopped) == (3, 1)
    assert algo.run_dir == Path.cwd() / "here"
    assert (algo.run_dir / "model").is_dir()
    text = capsys.readouterr().out
    assert "0.100 -> 0.300" in text
    assert "evaluation/held-out/reward_mean  0.430" in text
    assert str(algo.run_dir) in text


def test_train_reads_a_file_and_overrides_it(algorithm: type[FakeAlgorithm], tmp_path: Path) -> None:
    Path("lr=1").mkdir()
    conf = Path("lr=1/conf.yaml")
    conf.write_text("training:\n  iterations: 2\n  lr: 0.5\n  gamma: 0.9\n")
    assert cli.main(["train", f"./{conf}", "training.lr=1e-4"]) == 0
    training = algorithm.built[0].settings.training
    assert (training.iterations, training.lr, training.gamma) == (2, 1e-4, 0.9)


@pytest.mark.parametrize(
    ("more", "resume", "gamma"), [([], "any", 0.5), (["training.gamma=0.9"], "any", 0.9), (["conf.yaml"], "same", 0.5)]
)
def test_a_run_is_resumed_with_its_own_settings(
    more: list[str], resume: str, gamma: float, algorithm: type[FakeAlgorithm]
) -> None:
    Path("conf.yaml").write_text("training:\n  iterations: 2\n  gamma: 0.5\n")
    assert cli.main(["train", "conf.yaml", "--run-dir", "runs/it's x=1"]) == 0
    shutil.rmtree("runs/it's x=1/model")

    assert cli.main(["train", "--resume", "runs/it's x=1", *more]) == 0

    settings = algorithm.built[1].settings
    assert settings.training.iterations == 2
    assert (settings.training.gamma, settings.checkpointing.resume) == (gamma, resume)
    assert settings.reporting.run_dir == "runs/it's x=1"


def test_only_a_run_can_be_resumed(algorithm: type[FakeAlgorithm], capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()

    assert cli.main(["train", "--resume", "empty"]) == 2

    assert "--resume = 'empty': this folder holds no run" in capsys.readouterr().err
    assert algorithm.built == []


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "training.iterations=1", "--run-dir", "a", "training.lr=0.5"],
        ["train", "--run-dir", "a", "training.iterations=1", "training.lr=0.5"],
        ["train", "training.iterations=1", "training.lr=0.1", "training.lr=0.5", "--run-dir=a"],
    ],
)
def test_options_and_overrides_mix(algorithm: type[FakeAlgorithm], argv: list[str]) -> None:
    assert cli.main(argv) == 0
    assert algorithm.built[0].settings.training.lr == 0.5
    assert algorithm.built[0].run_dir.name == "a"


def test_a_command_is_never_silent_where_no_panel_can_be_drawn(algorithm: type[FakeAlgorithm]) -> None:
    cli.main(["train", "training.iterations=1"])
    cli.main(["train", "training.iterations=1", "reporting.progress=live"])
    assert [algo.settings.reporting.progress for algo in algorithm.built] == ["plain", "live"]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["train", "a.yaml", "b.yaml"], "'b.yaml' is not an override"),
        (["train", "training.lr"], "cannot read"),
        (["quickstart", "conf.yaml"], "'conf.yaml' is not an override"),
        (["train", "--rundir", "a"], "--rundir"),
        (["train", "--run", "a"], "--run"),
        (["report"], "RUN_DIR"),
        (["report", "run", "--completions", "few"], "invalid int value: 'few'"),
        (["report", "run", "--out", "page.html"], "--out"),
        (["fly"], "fly"),
        ([], "COMMAND"),
    ],
)
def test_a_wrong_command_line_exits_2_and_says_why(
    argv: list[str], told: str, capsys: pytest.CaptureFixture[str], algorithm: type[FakeAlgorithm]
) -> None:
    try:
        code: object = cli.main(argv)
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    assert told in capsys.readouterr().err
    assert algorithm.built == []


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["train", "missing.yaml"], "missing.yaml"),
        (["train", "training.learning_rate=1"], "training.lr"),
        (["train", "training.lr=-1"], "training.lr"),
        (["evaluate", "--checkpoint", "nowhere"], "no such folder"),
        (["config", "training.lr=fast"], "training.lr"),
        (["doctor", "training.gamma=2"], "training.gamma"),
        (["report", "nowhere"], "RUN_DIR = 'nowhere': no such folder"),
        (["report", "."], "this folder holds no run"),
    ],
)
def test_a_wrong_setting_is_one_line_on_stderr_and_exits_2(
    argv: list[str], told: str, capsys: pytest.CaptureFixture[str], algorithm: type[FakeAlgorithm]
) -> None:
    assert cli.main(argv) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.startswith("error: ")
    assert told in streams.err
    assert len(streams.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("data.path", "x", "no"), 2),
        (DataError("no rows"), 2),
        (LearnerError("gone"), 1),
        (RewardError("too many"), 1),
    ],
)
def test_an_error_of_the_library_is_a_message_and_stops_the_run(
    algorithm: type[FakeAlgorithm], error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    algorithm.error = error
    assert cli.main(["train"]) == code
    assert algorithm.built[0].stopped == 1
    err = capsys.readouterr().err
    assert err == f"error: {error}\n"


def test_any_other_error_keeps_its_traceback(
    algorithm: type[FakeAlgorithm], capsys: pytest.CaptureFixture[str]
) -> None:
    algorithm.error = ZeroDivisionError("by zero")
    assert cli.main(["train"]) == 1
    assert algorithm.built[0].stopped == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "raise self.error" in err


def test_ctrl_c_stops_the_run_and_says_where_it_is(
    algorithm: type[FakeAlgorithm], capsys: pytest.CaptureFixture[str]
) -> None:
    algorithm.error = KeyboardInterrupt()
    assert cli.main(["train"]) == 130
    (algo,) = algorithm.built
    assert algo.stopped == 1
    assert capsys.readouterr().err == f"stopping; what the run wrote is in {algo.run_dir}\n"


def test_the_signal_handler_of_before_is_put_back(algorithm: type[FakeAlgorithm]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    cli.main(["train", "training.iterations=1"])
    assert signal.getsignal(signal.SIGTERM) is before


def test_evaluate_prints_metrics_and_leaves_no_files(
    algorithm: type[FakeAlgorithm], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["evaluate", "evaluation.temperature=0.5"]) == 0
    (algo,) = algorithm.built
    assert capsys.readouterr().out.split() == ["held-out/reward_mean", "0.400"]
    assert list(tmp_path.iterdir()) == []
    assert not algo.run_dir.exists()
    assert algo.settings.evaluation.temperature == 0.5
    assert (algo.iteration, algo.stopped, algo.restored) == (0, 1, None)


def test_a_folder_that_cannot_be_deleted_hides_no_error_of_an_evaluation(
    algorithm: type[FakeAlgorithm], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise OSError("Directory not empty")

    def evaluate(self: FakeAlgorithm) -> None:
        raise RewardError("no group has a reward")

    monkeypatch.setattr(os, "rmdir", fails)
    monkeypatch.setattr(algorithm, "evaluate", evaluate)
    assert cli.main(["evaluate"]) == 1
    assert capsys.readouterr().err == "error: no group has a reward\n"


def test_evaluate_takes_a_checkpoint_with_the_settings_of_its_run(algorithm: type[FakeAlgorithm]) -> None:
    run = Path("runs/first")
    checkpoint = run / "checkpoints" / "step_000002"
    checkpoint.mkdir(parents=True)
    config = PPOConfig().training(gamma=0.5).reporting(run_dir=str(run), wandb_project="gsm8k")
    config.reporting(mlflow_experiment="gsm8k", mlflow_uri="sqlite:///kept.db", timeline_interval=1)
    config.to_yaml(run / "config.yaml")
    assert cli.main(["evaluate", "--checkpoint", str(checkpoint), "evaluation.temperature=0.7"]) == 0
    (algo,) = algorithm.built
    assert algo.restored == str(checkpoint)
    assert (algo.settings.training.gamma, algo.settings.evaluation.temperature) == (0.5, 0.7)
    reporting = algo.settings.reporting
    assert (reporting.wandb_project, reporting.mlflow_experiment, reporting.timeline_interval) == (None, None, 0)
    assert sorted(run.iterdir()) == [run / "checkpoints", run / "config.yaml"]


def test_a_checkpoint_without_settings_needs_a_file(
    algorithm: type[FakeAlgorithm], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a/b/c/checkpoint").mkdir(parents=True)
    assert cli.main(["evaluate", "--checkpoint", "a/b/c/checkpoint"]) == 2
    assert "name CONF.yaml" in capsys.readouterr().err
    Path("conf.yaml").write_text("training:\n  gamma: 0.5\n")
    assert cli.main(["evaluate", "conf.yaml", "--checkpoint", "a/b/c/checkpoint"]) == 0
    assert algorithm.built[0].settings.training.gamma == 0.5


def test_evaluate_measures_a_run_on_the_sets_that_are_named(algorithm: type[FakeAlgorithm]) -> None:
    run = Path("runs/first")
    (run / "model").mkdir(parents=True)
    (run / "model" / "config.json").write_text("{}")
    best = "evaluation/quickstart/reward_mean"
    config = PPOConfig().rewards("exact_match").evaluation(interval=5).checkpointing(best_metric=best, interval=5)
    config.to_yaml(run / "config.yaml")
    argv = ["evaluate", str(run / "model"), "--data", "a.jsonl", "evaluation.temperature=0.7", "--data", "hard=b.jsonl"]
    assert cli.main(argv) == 0
    (algo,) = algorithm.built
    algo.config.validate()
    assert algo.restored is None
    assert algo.settings.model.path == str(Path.cwd() / run / "model")
    assert algo.settings.data.eval_path == {"a": "a.jsonl", "hard": "b.jsonl"}
    assert (algo.settings.evaluation.temperature, len(algo.settings.rewards.functions)) == (0.7, 1)


def test_evaluate_needs_something_to_measure_on(
    algorithm: type[FakeAlgorithm], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", "data.path=train.jsonl", "rewards.functions=[gsm8k]"]) == 2
    assert "--data FILE" in capsys.readouterr().err
    assert algorithm.built == []


def test_config_prints_yaml_that_makes_the_same_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "training.lr=1e-5", "rollouts.group_size=8"]) == 0
    text = capsys.readouterr().out
    expected = PPOConfig().training(lr=1e-5).rollouts(group_size=8)
    assert PPOConfig.from_yaml(text) == expected
    assert yaml.safe_load(text)["training"]["lr"] == 1e-5
    schedule = [line for line in text.partition("# What follows")[2].splitlines() if line.startswith("#   ")]
    assert len(schedule) == len(expected.schedule().rows())
    assert all(value in text for _, value in expected.schedule().rows())
    assert max(len(line) for line in schedule) <= 80


def test_config_prints_the_plan_of_a_run_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "--plan", "rollouts.num_replicas=2", "resources.cpus_per_replica=0.25"]) == 0
    text = capsys.readouterr().out
    plan = dict(line[4:].split(maxsplit=2)[1:] for line in text.splitlines() if line.startswith("#   vLLM "))
    assert (plan["dtype"], plan["tensor_parallel_size"]) == ("float32", "1")
    assert "0.25 per replica" in text
    assert PPOConfig.from_yaml(text).settings.rollouts.num_replicas == 2


def test_the_plan_shows_what_only_the_model_can_refuse(capsys: pytest.CaptureFixture[str]) -> None:
    heads = ["learners.num_learners=3", "learners.sequence_parallel=3"]
    assert cli.main(["config", *heads]) == 0
    assert cli.main(["config", "--plan", *heads]) == 2
    assert "4 attention heads, which 3 learners cannot share" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["config", "doctor", "train", "evaluate", "launch local"])
def test_the_algorithm_is_named_on_the_command_line_as_in_a_file(
    where: str, algorithm: type[FakeAlgorithm], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("conf.yaml").write_text("training: {iterations: 1}\n")
    read: list[str] = []
    # Each command ends where it checks the settings that it has read.
    monkeypatch.setattr(AlgorithmConfig, "validate", lambda self: read.append(self.algorithm_name) or sys.exit(0))
    monkeypatch.setattr(AlgorithmConfig, "build_algo", lambda self: self.validate())
    cli.main([*where.split(), "conf.yaml", "algorithm=GRPO"])
    assert read == ["GRPO"]
    assert cli.main([*where.split(), "conf.yaml", "algorithm=GRPPO"]) == 2
    assert "error: algorithm = 'GRPPO': no such algorithm; there is CISPO" in capsys.readouterr().err


def test_config_shows_what_comes_from_the_preset_and_leaves_it_when_a_model_is_put_in(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["config", "training.lr=1e-5"]) == 0
    text = capsys.readouterr().out
    preset = text.partition("# From the quickstart's preset")[2].partition("\n\n")[0]
    assert re.findall(r"^#   ([\w.]+) +(.+)$", preset, re.MULTILINE) == [
        ("data.batch_size", "64"),
        ("rollouts.group_size", "4"),
        ("rollouts.max_new_tokens", "8"),
        ("rollouts.timeout_s", "600.0"),
        ("training.critic_lr", "0.0003"),
        ("training.lr_schedule", '"linear"'),
        ("training.lambda_", "0.95"),
        ("learners.max_tokens_per_microbatch", "4096"),
        ("learners.gradient_checkpointing", "false"),
    ]
    with_model = PPOConfig.from_yaml(text.replace("model:\n  path: null\n", "model:\n  path: owner/model\n"))
    assert with_model == PPOConfig().model(path="owner/model").training(lr=1e-5)
    assert cli.main(["config", "model.path=owner/model"]) == 0
    text = capsys.readouterr().out
    assert "preset" not in text
    assert yaml.safe_load(text)["rollouts"]["max_new_tokens"] == 1024


@pytest.fixture
def two_runs(algorithm: type[FakeAlgorithm]) -> None:
    """Run directories ``runs/a`` and ``runs/b=1``, settings alone."""
    for name in ("a", "b=1"):
        RunDirectory.create(f"runs/{name}", algorithm="PPO").write_config(PPOConfig().to_yaml())


@pytest.mark.parametrize(
    ("argv", "page", "title"),
    [
        (["runs/a"], "runs/a/report.html", "a"),
        (["runs/a", "runs/b=1"], "report.html", "a, b=1"),
        (["runs/a", "--output", "page.html", "runs/b=1"], "page.html", "a, b=1"),
        (["--output=page.html", "runs/b=1"], "page.html", "b=1"),
    ],
)
def test_report_writes_a_page_and_says_where_it_is(
    two_runs: None, argv: list[str], page: str, title: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", *argv]) == 0
    assert capsys.readouterr().out == f"{Path.cwd() / page}\n"
    assert f"<title>{title} - rlhf_ray</title>" in Path(page).read_text(encoding="utf-8")


def test_report_shows_the_completions_that_are_asked_for(two_runs: None) -> None:
    reporter = CompletionsReporter(Settings(), RunDirectory.reopen("runs/a"))
    for step in range(1, 21):
        reporter.report_completions(step, [addition(step, f"{step}+0=", "1", 0.0)])
    shown = []
    for option in ([], ["--completions", "2"], ["--completions=0"]):
        assert cli.main(["report", "runs/a", *option]) == 0
        text = Path("runs/a/report.html").read_text(encoding="utf-8")
        shown.append([step for step in range(1, 21) if f'"{step}+0="' in text])
    assert shown == [[1, 4, 8, 12, 16, 20], [1, 20], []]


def test_the_help_of_report_names_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["report", "--help"])
    assert f"default: {DEFAULT_TABLES}, spread over the run" in " ".join(capsys.readouterr().out.split())


def test_quickstart_measures_before_and_after(
    algorithm: type[FakeAlgorithm], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["quickstart", "training.iterations=20"]) == 0
    (algo,) = algorithm.built
    assert (algo.iteration, algo.stopped, algo.settings.evaluation.interval) == (20, 1, 10)
    text = capsys.readouterr().out
    assert text.index("before training (greedy): 40.0%") < text.index("after training (greedy): 60.0%")
    assert f"tensorboard --logdir {algo.run_dir}" in text


def test_quickstart_shows_what_the_model_wrote(
    algorithm: type[FakeAlgorithm], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = FakeAlgorithm.train

    def train_and_write(self: FakeAlgorithm) -> dict[str, Any]:
        reporter = CompletionsReporter(self.settings, self.directory)
        reporter.report_completions(self.iteration + 1, [addition(1, "47+85=", "132", 1.0)])
        return train(self)

    monkeypatch.setattr(algorithm, "train", train_and_write)
    assert cli.main(["quickstart", "training.iterations=1"]) == 0
    assert ["47+85=", "132", "right"] in [line.split() for line in capsys.readouterr().out.splitlines()]


def addition(group_id: int, prompt: str, completion: str, reward: float) -> ScoredGroup:
    import numpy as np

    from rlhf_ray.types import Prompt, RolloutGroup, Trajectory, VersionSpan

    tokens = np.frombuffer(completion.encode(), dtype=np.uint8).astype(np.int32)
    written = Trajectory.single_turn(
        token_ids=tokens,
        sampling_logprobs=np.zeros(len(tokens), dtype=np.float32),
        asked_version=0,
        version_spans=(VersionSpan(version=0, start=0, end=len(tokens)),),
        finish_reason="stop",
    )
    rewards = np.array([reward], dtype=np.float32)
    return ScoredGroup(
        group=RolloutGroup(
            group_id=group_id,
            prompt=Prompt(prompt_id=group_id, token_ids=tokens, text=prompt),
            trajectories=(written,),
            replica_id="replica",
        ),
        rewards=rewards,
        rewards_by_function={"reward": rewards},
        texts=(completion,),
        reward_s=0.0,
    )


# --- in processes of their own ---


@pytest.mark.parametrize(
    "argv", [["--help"], ["train", "--help"], ["doctor", "--help"], ["config"], ["train", "x=1"], ["doctor", "x=1"]]
)
def test_help_settings_and_mistakes_import_nothing_heavy(argv: list[str]) -> None:
    script = f"""
import sys
from rlhf_ray.cli import main
try:
    main({argv!r})
except SystemExit:
    pass
heavy = {{"ray", "torch", "vllm", "transformers", "numpy", "pyarrow", "wandb", "datasets"}} & sys.modules.keys()
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, capture_output=True)


ENDLESS = """
import signal, sys, time
from pathlib import Path
from rlhf_ray import cli
from rlhf_ray.algorithms.ppo import PPOConfig

class Endless:
    iteration = 0
    run_dir = Path("runs/endless")

    def __init__(self, config):
        self.settings = config.settings
        # What ray.init does, after ending Ray's own processes.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        if {slow_build}:
            self.wait("building")

    def wait(self, what):
        print(what, flush=True)
        time.sleep(60)

    def train(self):
        self.wait("training")

    def stop(self):
        print("asked to stop", flush=True)
        time.sleep(0.5)
        print("stopped", flush=True)

PPOConfig.algorithm_class = Endless
sys.exit(cli.main(["train"]))
"""


def interrupted(signals: list[int], *, slow_build: bool) -> tuple[int, str]:
    """Start an endless run, send the signals once it is under way, and return its code and output."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(ENDLESS).replace("{slow_build}", str(slow_build))],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # A test run in the background passes on that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        for number in signals:
            time.sleep(0.1)
            process.send_signal(number)
        rest, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    return process.returncode, first + rest


def test_sigterm_is_a_clean_stop() -> None:
    code, output = interrupted([signal.SIGTERM], slow_build=False)
    assert code == 143
    assert output.splitlines() == [
        "training",
        "stopping; what the run wrote is in runs/endless",
        "asked to stop",
        "stopped",
    ]


def test_a_second_sigterm_does_not_cut_the_stop_short() -> None:
    code, output = interrupted([signal.SIGTERM, signal.SIGTERM], slow_build=False)
    assert code == 143
    assert output.splitlines()[-1] == "stopped"


def test_a_second_ctrl_c_does() -> None:
    code, output = interrupted([signal.SIGINT, signal.SIGINT], slow_build=False)
    assert code == 130
    assert output.splitlines()[-1] == "asked to stop"


def test_sigterm_during_start_up_ends_with_its_own_code() -> None:
    code, output = interrupted([signal.SIGTERM], slow_build=True)
    assert code == 143
    assert output.splitlines() == ["building"]
