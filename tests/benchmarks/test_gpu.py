"""benchmarks/gpu.py at its small size: what it would say on a card is worth something only if it can say no."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A bench on the CPU whose models have one narrow layer."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu
    import gpu_learner
    from rank import one_rank

    narrow = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    monkeypatch.setattr(gpu_learner, "SMALL", gpu_learner.SMALL | narrow)
    monkeypatch.setattr(gpu_learner, "CPU_KERNELS", ("sdpa", "varlen"))
    with one_rank():
        yield gpu.Bench(
            device=torch.device("cpu"), tiny=True, scratch=tmp_path, out=tmp_path / "gpu.json", ends_at=float("inf")
        )


def test_a_right_learner_passes(bench: Any) -> None:
    import gpu_learner

    bench.run("precision", gpu_learner.precision)
    bench.run("kernels", gpu_learner.attention_kernels)
    bench.run("state", gpu_learner.state)
    assert bench.wrong == []
    assert bench.found["kernels"]["varlen"]["weights"] < 1e-6
    assert json.loads(bench.out.read_text())["checks"].keys() == {"precision", "kernels", "state"}


def test_weights_that_do_not_move_or_come_back_are_found(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_learner

    from rlhf_ray.learner.learner import Learner
    from rlhf_ray.learner.trained_model import TrainedModel

    monkeypatch.setattr(Learner, "recall", lambda self, version: None)
    bench.run("state", gpu_learner.state)
    monkeypatch.setattr(TrainedModel, "step", lambda self, norm: self.drop_gradients())
    bench.run("precision", gpu_learner.precision)
    assert [text.partition(":")[0] for text in bench.wrong] == [
        "the update after a state that was recalled is another one",
        "the update after a state that was recalled and offloaded is another one",
        "float32",
        "bfloat16",
    ]


def test_an_error_is_a_finding_and_the_next_check_is_made(bench: Any) -> None:
    bench.run("broken", lambda bench: 1 / 0)
    bench.run("next", lambda bench: "made")
    bench.ends_at = 0.0
    bench.run("late", lambda bench: "made")
    assert bench.wrong == ["broken raised ZeroDivisionError: division by zero"]
    assert bench.found["next"] == "made"
    assert "not run" in bench.found["late"]


def test_operations_of_an_update(bench: Any) -> None:
    import gpu_learner
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(Qwen2Config(**gpu_learner.SMALL))
    batch = gpu_learner.sequences(2, prompt=8, mean=8, longest=8, vocabulary=64)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lengths = batch.lengths.tolist()
    expected = sum(2 * parameters * n + 2 * 32 * n * n for n in lengths)
    assert gpu_learner.model_flops(model, batch, passes=1.0) == expected


@pytest.mark.slow
def test_the_command_itself(tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / "gpu.py", "--learner-only", "--tiny", "--out", tmp_path / "gpu.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert len(json.loads((tmp_path / "gpu.json").read_text())["checks"]) >= 10
