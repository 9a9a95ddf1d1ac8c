"""The example scripts as a user runs them, shortened by their own arguments."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_ray.quickstart import model_path

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.usefixtures("no_session_in_this_process")]

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(folder: Path, script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done.stdout


def test_rewards_of_ones_own(tmp_path: Path) -> None:
    printed = run(tmp_path, "custom_reward.py", "training.iterations=2", "data.batch_size=16")
    assert printed.count("   near ") == 2
    assert "held-out accuracy: 47" in printed


def test_a_training_step_of_ones_own(tmp_path: Path) -> None:
    printed = run(tmp_path, "custom_training_step.py", "training.iterations=2", "data.batch_size=16")
    assert printed.count("tokens per completion, cost 0.") == 2


def test_a_reward_model_that_the_example_trains(tmp_path: Path) -> None:
    printed = run(tmp_path, "ppo_reward_model.py", "training.iterations=2", "data.batch_size=16")
    assert printed.count("   correct ") == 2
    assert "held out, after: reward model" in printed


def test_a_sweep_with_asha_its_table_and_its_plot(tmp_path: Path) -> None:
    printed = run(tmp_path, "tune_sweep.py", "--trials", "2", "--iterations", "3", "--storage", "sweeps", "--name", "s")
    assert printed.count(": ended") == 2
    assert "trials failed" not in printed
    assert "best run: " in printed
    assert (tmp_path / "sweeps" / "s" / "sweep.png").stat().st_size > 10_000


def test_gsm8k_as_a_script_with_a_file_and_overrides(tmp_path: Path) -> None:
    rows = [{"question": f"Tom has {n} pens and buys {n}. How many?", "answer": f"#### {2 * n}"} for n in range(16)]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    printed = run(
        tmp_path,
        "gsm8k_ppo.py",
        *("--config", str(EXAMPLES / "gsm8k_ppo.yaml"), f"model.path={model_path()}"),
        *("data.path=train.jsonl", "data.eval_path=test.jsonl", "data.batch_size=4", "training.iterations=2"),
        *("rollouts.max_new_tokens=32", "rollouts.max_prompt_tokens=300", "training.num_minibatches=1"),
    )
    assert printed.count("iteration ") == 2
    assert printed.count("of 16 problems of test correct") == 2
    (model,) = tmp_path.glob("runs/*/model/model.safetensors")
    assert f"trained model: {model.parent}" in printed
