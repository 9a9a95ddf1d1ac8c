"""What a user types, in a process of its own: the README's snippet, and the command line with Ctrl-C in the middle."""

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

from rlhf_ray.quickstart import model_path

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("no_session_in_this_process")]

SNIPPET = """\
from rlhf_ray import PPOConfig
algo = PPOConfig().build()
result = algo.train()
print('DIFF', result['learner']['sampling_logprob_diff_max'], 'END')
"""
GSM8K = Path(__file__).parents[2] / "examples" / "gsm8k_ppo.yaml"


@pytest.mark.parametrize(
    "shell", [pytest.param(False, id="script"), pytest.param(True, id="shell", marks=pytest.mark.slow)]
)
def test_the_snippet_of_the_readme_ends_clean(tmp_path: Path, shell: bool) -> None:
    script = tmp_path / "snippet.py"
    script.write_text(SNIPPET)
    done = subprocess.run(
        [sys.executable, "-i"] if shell else [sys.executable, str(script)],
        input=SNIPPET if shell else "",
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert float(done.stdout.split("DIFF")[1].split("END")[0]) < 1e-3
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "metrics.jsonl").exists()


# A job that is told to stop is a slow test too (test_jobs.py); both signals take the same way.
@pytest.mark.parametrize("stop", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_the_gsm8k_example_trains_until_it_is_told_to_stop(tmp_path: Path, stop: signal.Signals) -> None:
    rows = [{"question": f"Tom has {n} pens and buys {n}. How many?", "answer": f"#### {2 * n}"} for n in range(40)]
    data, run = tmp_path / "train.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [
        f"data.path={data}",
        f"model.path={model_path()}",
        f"reporting.run_dir={run}",
        "data.batch_size=8",
        "rollouts.max_new_tokens=32",
    ]
    command = [str(Path(sys.executable).with_name("rlhf-ray")), "train", str(GSM8K), *overrides]
    log = tmp_path / "log"
    # A session of its own: signals go to every process of its group.
    with log.open("w") as output:
        child = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A test run in the background passes on that Ctrl-C is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        wait_for_iterations(run / "metrics.jsonl", 2, child)
        started = psutil.Process(child.pid).children(recursive=True)
        os.killpg(child.pid, stop)  # As a terminal, or `timeout`, does.
        code = child.wait(120)
    finally:
        child.kill()
    text = log.read_text()
    assert code == 128 + stop, text[-3000:]
    assert "Traceback" not in text
    assert f"what the run wrote is in {run}" in text
    assert len(started) > 5
    _, left = psutil.wait_procs(started, timeout=20)
    assert left == []
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert first["rollouts/num_completions"] == 32
    assert first["learner/sampling_logprob_diff_max"] < 1e-3


def wait_for_iterations(metrics: Path, count: int, child: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and child.poll() is None:
        if metrics.exists() and len(metrics.read_text().splitlines()) >= count:
            return
        time.sleep(0.5)
    raise AssertionError(f"no {count} iterations; the process ended with {child.poll()}")
