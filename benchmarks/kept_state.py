"""What keeping the learner's state costs: host memory and seconds, of the copy after an update and of a checkpoint.

One rank, PPO with a critic, 64 sequences of 12 + 24 tokens, in a process of its own for each size. Parameters are those
of policy and critic. Measured are

- ``update_s``: an update without a copy, the process's first, and ``update_while_copied_s``: one that begins together
  with the copy of the state before it, whose first step waits for the copy. In a run engines sample meanwhile;
- ``begin_s``: what the rank's thread spends on a copy, and ``copy_s``: until it is complete, when nothing else runs;
- ``share``: ``copy_s`` in ``update_while_copied_s``, an iteration of an update alone: the most that a copy can take;
- ``bytes_per_parameter``: host memory of the kept states, and what the process grows by beyond them, at the most;
- ``checkpoint_s``, and what the process grows by while one is written.

The largest size is tensors alone, without a model, whose copies this machine may have to keep on disk.

    python benchmarks/kept_state.py [--model FOLDER] [--sizes 1M 135M 1B]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bare_loop import sequences_of, split
from provenance import write_result
from rank import learner_spec, one_rank

from rlhf_ray import PPOConfig
from rlhf_ray.learner.kept_state import KeptState
from rlhf_ray.learner.learner import Learner
from rlhf_ray.quickstart import model_path

SIZES = ("1M", "135M", "1B")
PROMPTS, PROMPT_TOKENS, COMPLETION_TOKENS = 64, 12, 24
COPIES = 3


def seconds(work: Callable[[], object]) -> float:
    """Wall time of a call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def resident(name: str = "VmRSS") -> int:
    """Bytes of this process, now or (``VmHWM``) at the most since :func:`reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def reset_peak() -> int:
    """Begin to look for the peak anew; bytes now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident()


def shape_of_135m() -> str:
    """A folder with a model of SmolLM2-135M's shape and random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tempfile.mkdtemp(prefix="kept-state-")
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@one_rank()
def measure(path: str | None) -> dict[str, Any]:
    """A learner with a model."""
    kept = KeptState(2)
    config = PPOConfig().training(lr=1e-9, critic_lr=1e-9)
    learner = Learner(learner_spec(config, path or model_path(), keeps_state=True), kept)
    parameters = sum(one.numel() for model in learner._models.trained.values() for one in model.model.parameters())
    batch = sequences_of(PROMPT_TOKENS, np.full(PROMPTS, COMPLETION_TOKENS, dtype=np.int32))
    own, rank, _ = split(batch, num_minibatches=1, max_tokens=2048)
    update_s = seconds(lambda: learner.update(own, rank))
    begun, copied = [], []
    before = reset_peak()
    for version in range(COPIES):
        learner._change()
        begun.append(seconds(partial(learner.keep_state, version)))
        copied.append(begun[-1] + seconds(learner.wait_copied))
    grown = resident("VmHWM") - before
    learner._change()
    learner.keep_state(COPIES)
    update_while_copied_s = seconds(lambda: learner.update(own, rank))
    before = reset_peak()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint_s = seconds(lambda: learner.save(folder, COPIES + 1).result())
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
    found = {
        "parameters": parameters,
        "update_s": update_s,
        "update_while_copied_s": update_while_copied_s,
        "begin_s": min(begun),
        "first_copy_s": copied[0],
        "copy_s": min(copied),
        "share": min(copied) / update_while_copied_s,
        "checkpoint_s": checkpoint_s,
        "checkpoint_bytes_per_parameter": size / parameters,
        "checkpoint_grows_by_bytes_per_parameter": (resident("VmHWM") - before) / parameters,
    }
    return found | memory(kept, grown, parameters)


def measure_tensors(parameters: int) -> dict[str, Any]:
    """The state of a model that need not fit: all its tensors are the same few megabytes."""
    piece = torch.randn(2**20)
    state = {
        f"{kind}.{index}": piece for kind in ("weights", "exp_avg", "exp_avg_sq") for index in range(parameters >> 20)
    }
    kept, copied = KeptState(2), []
    before = reset_peak()
    for version in range(COPIES):
        begun_s = seconds(partial(kept.begin, version, state))
        copied.append(begun_s + seconds(kept.wait))
    assert kept.versions
    parameters = parameters >> 20 << 20
    found = {"parameters": parameters, "first_copy_s": copied[0], "copy_s": min(copied)}
    return found | memory(kept, resident("VmHWM") - before, parameters)


def memory(kept: KeptState, grown: int, parameters: int) -> dict[str, Any]:
    """Where the states lie and what they take."""
    states = sum(os.stat(path).st_blocks * 512 for path in kept.paths())
    return {
        "in_memory": all("memfd" in os.readlink(path) for path in kept.paths()),
        "bytes_per_parameter": states / parameters,
        "process_grows_by_bytes_per_parameter": grown / parameters,
    }


def main() -> None:
    """Measure the sizes, print, write results/kept_state.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of SmolLM2-135M; without it, random weights of its shape")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument("--one", choices=SIZES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        path = None if arguments.one == "1M" else (arguments.model or shape_of_135m())
        found = measure_tensors(10**9) if arguments.one == "1B" else measure(path)
        print("RESULT", json.dumps(found))
        return
    sizes: dict[str, dict[str, Any]] = {}
    for name in arguments.sizes:
        command = [sys.executable, __file__, "--one", name]
        if arguments.model is not None:
            command += ["--model", arguments.model]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        sizes[name] = json.loads(output.split("RESULT")[1])
        print(name, *(f"{key} {value:.4g}" for key, value in sizes[name].items()), sep="\n  ")
    print("written to", write_result("kept_state", {"sizes": sizes}))


if __name__ == "__main__":
    main()
