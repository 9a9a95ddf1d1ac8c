"""benchmarks/gpu.py at its small size: what it would say on a card is worth something only if it can say no."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import save_file

from rlhf_ray.config.checks import validate

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A bench on the CPU whose models have one narrow layer; ``content`` is what it has reported."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu
    import gpu_learner
    from rank import one_rank

    from rlhf_ray.learner.spec import LearnerSpec

    narrow = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    monkeypatch.setattr(gpu_learner, "SMALL", gpu_learner.SMALL | narrow)
    # Two threads that share a core with something else are slower than one, for models of this size.
    monkeypatch.setattr(LearnerSpec, "threads", lambda spec, num_ranks: 1)
    report = gpu.Report(tmp_path / "gpu.json")
    report.content = {"checks": {}}
    with one_rank():
        yield gpu.Bench("part", report, device=torch.device("cpu"), tiny=True, scratch=tmp_path, ends_at=float("inf"))


def found(bench: Any, name: str, check: Any, **options: Any) -> dict[str, Any]:
    """What the result file says of one check."""
    bench.run(name, check, **options)
    return json.loads((bench.scratch / "gpu.json").read_text())["checks"]["part"][name]


def not_ok(check: dict[str, Any]) -> list[str]:
    assert check["status"] == "wrong", check
    return [each["what"] for each in check["expectations"] if not each["ok"]]


def test_a_right_learner_passes(bench: Any) -> None:
    import gpu_learner

    for check in (gpu_learner.precision, gpu_learner.attention_kernels, gpu_learner.state):
        said = found(bench, "check", check)
        assert said["status"] == "ok", said
        assert len(said["expectations"]) >= 2
        assert all(each.keys() == {"what", "expected", "seen", "ok"} for each in said["expectations"])


def test_weights_that_do_not_move_or_come_back_are_found(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_learner

    from rlhf_ray.learner.learner import Learner
    from rlhf_ray.learner.trained_model import TrainedModel

    monkeypatch.setattr(Learner, "recall", lambda self, version: None)
    assert not_ok(found(bench, "state", gpu_learner.state)) == [
        "recalled: update apart from the first",
        "recalled and offloaded: update apart from the first",
    ]
    step, steps = TrainedModel.step, []

    def only_on_the_cpu(self: Any, norm: Any) -> Any:
        steps.append(self)
        return step(self, norm) if len(steps) <= 4 else self.drop_gradients()

    monkeypatch.setattr(TrainedModel, "step", only_on_the_cpu)
    wrong = not_ok(found(bench, "precision", gpu_learner.precision))
    assert "float32: weights that did not move" in wrong
    assert "bfloat16: update apart from the CPU's" in wrong


def test_another_update_in_bfloat16_is_found(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_learner

    update, updates = gpu_learner.update, []

    def swapped_last(rank: Any, batch: Any) -> dict[str, float]:
        updates.append(rank)
        rewards = batch.rewards.copy()
        rewards[:2] = rewards[1::-1]
        return update(rank, batch.with_rewards(rewards) if len(updates) == 3 else batch)

    monkeypatch.setattr(gpu_learner, "update", swapped_last)
    assert "bfloat16: update apart from the CPU's" in not_ok(found(bench, "precision", gpu_learner.precision))


def test_sequences_that_see_each_other_are_found(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_learner
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from rlhf_ray.learner import models, packed_rows

    monkeypatch.setattr(models, "register", lambda: AttentionInterface.register("varlen", sdpa_attention_forward))
    monkeypatch.setattr(packed_rows, "keeps_sequences_apart", lambda *_, **__: True)
    assert not_ok(found(bench, "kernels", gpu_learner.attention_kernels)) == [
        "varlen: log-probabilities apart from padded SDPA's",
        "varlen: update apart from padded SDPA's",
    ]


def test_an_error_is_a_finding_and_the_next_check_is_made(bench: Any) -> None:
    assert "ZeroDivisionError" in found(bench, "broken", lambda bench: 1 / 0)["why"]
    assert found(bench, "next", lambda bench: "made")["measured"] == "made"
    bench.run("not a number", lambda bench: bench.at_most("loss", float("nan"), 1.0))
    skipped = found(bench, "on a card", lambda bench: "made", num_gpus=1)
    assert skipped == {"status": "skipped", "why": "it needs 1 GPU(s), and this machine has 0"}
    content = json.loads((bench.scratch / "gpu.json").read_text())
    assert not content["ok"]
    states = {name: check["status"] for name, check in content["checks"]["part"].items()}
    assert states == {"broken": "error", "next": "ok", "not a number": "wrong", "on a card": "skipped"}


def test_a_part_whose_process_dies_is_a_finding(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu

    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS))
    out = bench.scratch / "gpu.json"
    gpu.Report(out).content = {}
    bench.run("before", lambda bench: None)
    report = gpu.Report(out)
    report.note("no such part", "under way", {"status": "running", "expectations": []})
    gpu.run_apart("no such part", out, tiny=True, scratch=bench.scratch, ends_at=0.0)
    checks = json.loads(out.read_text())["checks"]
    assert checks["part"]["before"]["status"] == "ok"
    assert checks["no such part"]["under way"]["status"] == "error"
    assert gpu.Report.failures(checks) == ["no such part: under way: the process of this part ended with 1"]


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("skipped", 0), ("wrong", 1), ("error", 1), ("running", 1)])
def test_the_exit_code_says_whether_a_check_failed(
    bench: Any, monkeypatch: pytest.MonkeyPatch, status: str, code: int
) -> None:
    import gpu

    def made(name: str, out: Path, **options: Any) -> None:
        gpu.Report(out).note(name, "check", {"status": status, "expectations": []})

    out = bench.scratch / "gpu.json"
    monkeypatch.setattr(gpu, "run_apart", made)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--parts", "engine", "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == code
    content = json.loads(out.read_text())
    assert content["ok"] is (code == 0)
    assert content["machine"]["gpus"] == []
    assert "torch" in content["versions"]


def test_operations_of_an_update(bench: Any) -> None:
    import gpu_learner
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(Qwen2Config(**gpu_learner.SMALL))
    batch = gpu_learner.sequences(2, prompt=8, mean=8, longest=8, vocabulary=64)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lengths = batch.lengths.tolist()
    expected = sum(2 * parameters * n + 2 * 32 * n * n for n in lengths)
    assert gpu_learner.model_flops(model, batch, passes=1.0) == expected


def test_step_tokens_that_the_settings_do_not_ask_for_are_found(bench: Any) -> None:
    import gpu_engine
    import gpu_learner

    spec = gpu_engine.spec(
        bench, gpu_learner.model(bench, gpu_learner.SMALL), group_size=2, groups=4, tokens=8, colocated=False
    )
    asked = spec.engine_args

    def check(step_tokens: int) -> Any:
        model_config = SimpleNamespace(**{name: asked.get(name) for name in ("max_model_len", "seed", "logprobs_mode")})
        model_config.dtype, model_config.enforce_eager = torch.float32, asked["enforce_eager"]
        config = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=asked["max_num_seqs"], max_num_batched_tokens=step_tokens),
            model_config=model_config,
            weight_transfer_config=SimpleNamespace(backend="rlhf_ray_shared_memory"),
            compilation_config=SimpleNamespace(cudagraph_mode=SimpleNamespace(name="NONE")),
        )
        engine = SimpleNamespace(_engine=SimpleNamespace(vllm_config=config))
        sampler = SimpleNamespace(engine=engine, spec=spec)
        return found(bench, "arguments", lambda bench: gpu_engine.check_arguments(bench, sampler))

    assert check(8192)["status"] == "ok"
    assert not_ok(check(2048)) == ["max_num_batched_tokens"]


class RecordedRun:
    """A run of a few iterations, and the weights after it."""

    def __init__(self, *, distance: float = 0.001, change: float = 0.1, weight: float = 1.0) -> None:
        learner = {"sampling_logprob_diff_max": 0.1, "sampling_logprob_diff_mean": distance, "approx_kl": change}
        rest = {"timers": {}, "fault_tolerance": {"replica_restarts": 1}}
        self._results = iter([{"learner": learner | {"policy_version": n}} | rest for n in range(1, 6)])
        self._weight = weight

    def train(self) -> Any:
        return next(self._results)

    def _running(self) -> Any:
        bridge = SimpleNamespace(places=SimpleNamespace(remote=lambda: ({"a": ("n", "0")}, {0: ("n", "0")})))
        return SimpleNamespace(learners=SimpleNamespace(bridge=bridge))

    def export_hf(self, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        save_file({"weight": torch.full((2,), self._weight)}, folder / "model.safetensors")
        return folder

    def stop(self) -> None:
        pass


@pytest.fixture
def gpu_runs(bench: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, without Ray and engines."""
    import gpu_runs
    import ray

    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(gpu_runs, "_first_weights", lambda: {"weight": torch.zeros(2)})
    monkeypatch.setattr(gpu_runs, "engine_process", lambda: SimpleNamespace(kill=lambda: None))
    return gpu_runs


def test_an_engine_with_old_weights_is_found(bench: Any, gpu_runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def turns(**second: float) -> Any:
        runs = iter([RecordedRun(), RecordedRun(**second)])
        monkeypatch.setattr(gpu_runs.PPOConfig, "build_algo", lambda config: next(runs))
        return found(bench, "turns", gpu_runs.turns)

    assert turns()["status"] == "ok"
    assert not_ok(turns(distance=0.1)) == ["separate: mean distance of an engine's log-probabilities from learners'"]
    assert not_ok(turns(change=0.01)) == ["separate: change of the policy by an update before the last, KL"]
    assert not_ok(turns(weight=1.0 + 1e-6)) == ["weights apart from those of separate"]


def test_runs_on_gpus_have_settings_that_are_allowed(
    bench: Any, gpu_runs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def build(config: Any) -> RecordedRun:
        settings = config.settings
        validate(settings)
        rollouts, resources = settings.rollouts, settings.resources
        asked.append((resources.device, resources.colocate, rollouts.weight_transfer, rollouts.tensor_parallel_size))
        return RecordedRun()

    monkeypatch.setattr(gpu_runs.PPOConfig, "build_algo", build)
    bench.on_gpu = True
    for check in (gpu_runs.turns, gpu_runs.over_nccl, gpu_runs.through_shared_memory, gpu_runs.killed_engine):
        assert found(bench, "run", check)["status"] == "ok"
    assert found(bench, "run", gpu_runs.tensor_parallel)["status"] == "ok"
    # The recorded run has one pair.
    assert not_ok(found(bench, "run", gpu_runs.two_pairs)) == ["GPUs that have a pair"]
    assert asked == [
        ("cuda", True, "auto", 1),
        ("cuda", True, "ipc", 1),
        ("cuda", False, "nccl", 1),
        ("cuda", False, "shared_memory", 1),
        ("cuda", False, "auto", 1),
        ("cuda", False, "auto", 2),
        ("cuda", True, "ipc", 1),
    ]


def needed_by(*names: str) -> set[str]:
    """Distributions that these ask for, themselves included."""
    needed: set[str] = set()
    waiting = [canonicalize_name(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            with suppress(PackageNotFoundError):
                asked = map(Requirement, requires(name) or ())
                waiting += [canonicalize_name(r.name) for r in asked if not r.marker or r.marker.evaluate()]
    return needed


@pytest.fixture
def lean(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python where torch, transformers and what these ask for are all that is installed."""
    site = tmp_path / "site-packages"
    site.mkdir()
    for name in needed_by("torch", "transformers"):
        with suppress(PackageNotFoundError):
            installed = distribution(name)
            for top in {file.parts[0] for file in installed.files or ()} - {"..", "__pycache__"}:
                (site / top).symlink_to(installed.locate_file(top))
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, BENCHMARKS, site)))}

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        # Without -S Python would look where the project is installed, too.
        return subprocess.run([sys.executable, "-S", *arguments], capture_output=True, text=True, check=False, env=env)

    return run


def test_the_learner_part_needs_torch_and_transformers_alone(lean: Callable[..., Any]) -> None:
    done = lean("-c", "import gpu, gpu_learner; print(gpu.machine()); import ray")
    assert "'gpus': []" in done.stdout, done.stderr
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'ray'"


@pytest.mark.slow
def test_the_command_itself(lean: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = lean(BENCHMARKS / "gpu.py", "--learner-only", "--tiny", "--out", out)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    content = json.loads(out.read_text())
    assert content["ok"]
    assert content["versions"].keys() == {"torch", "transformers"}
    assert len(content["checks"]["learner"]) >= 10


@pytest.mark.slow
def test_two_ranks_that_read_slices(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_runs

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, BENCHMARKS))))
    said = found(bench, "slices", gpu_runs.sequence_parallel)
    assert said["status"] == "ok", said
