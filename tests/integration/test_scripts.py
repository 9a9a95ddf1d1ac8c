"""What a user types: the snippet of the README, the command line on GSM8K, Ctrl-C. Each in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray

from rlhf_ray.quickstart import model_path

pytestmark = pytest.mark.engine

REPOSITORY = Path(__file__).parents[2]
GSM8K = Path(os.environ.get("RLHF_RAY_GSM8K", REPOSITORY.parent / "shared" / "data" / "gsm8k"))
CLI = [str(Path(sys.executable).with_name("rlhf-ray"))]


@pytest.fixture(scope="module", autouse=True)
def no_session_in_this_process() -> None:
    """Each script starts a Ray of its own; two at once would share the cores."""
    if ray.is_initialized():
        ray.shutdown()


def descendants_alive(pids: list[int]) -> list[str]:
    alive = []
    for pid in pids:
        try:
            process = psutil.Process(pid)
            if process.status() != psutil.STATUS_ZOMBIE:
                alive.append(" ".join(process.cmdline())[:120])
        except psutil.NoSuchProcess:
            continue
    return alive


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


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not here: set RLHF_RAY_GSM8K to its folder")
def test_gsm8k_by_command_line_and_ctrl_c_in_the_middle(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [
        *CLI,
        "train",
        str(REPOSITORY / "examples" / "gsm8k_ppo.yaml"),
        f"data.path={GSM8K / 'train.jsonl'}",
        f"model.path={model_path()}",
        "data.batch_size=4",
        "rollouts.max_new_tokens=32",
        f"reporting.run_dir={run}",
    ]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 400
        while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 2:
            assert process.poll() is None, process.communicate()[0][-3000:]
            assert time.monotonic() < deadline, "no second iteration"
            time.sleep(0.5)
        children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        assert children
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, output[-3000:]
    assert "Traceback" not in output
    assert str(run) in output
    time.sleep(2)
    assert descendants_alive(children) == []
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert first["rollouts/num_completions"] >= 4
    assert first["rollouts/prompt_tokens_mean"] > 50
    assert (run / "config.yaml").exists()
    assert (run / "completions" / "step_000001.parquet").exists()
