"""What a user types, in a process of its own: the snippet of the README."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import ray

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module", autouse=True)
def no_session_in_this_process() -> None:
    """The script starts a Ray of its own; two at once would share the cores."""
    if ray.is_initialized():
        ray.shutdown()


def test_the_snippet_of_the_readme_ends_clean(tmp_path: Path) -> None:
    script = tmp_path / "snippet.py"
    script.write_text(
        "from rlhf_ray import PPOConfig\n"
        "algo = PPOConfig().build()\n"
        "result = algo.train()\n"
        "print('DIFF', result['learner']['sampling_logprob_diff_max'])\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert float(done.stdout.split("DIFF")[1]) < 1e-3
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "metrics.jsonl").exists()
