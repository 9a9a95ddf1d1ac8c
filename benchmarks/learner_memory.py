"""Resident memory of a learner process, stage by stage: PPO with a critic, one rank in float32 on the CPU.

64 sequences of 40 prompt tokens and 24 new ones, GAE, the defaults of a run (gradient checkpointing, four optimizer
steps): imports, models, an update and a publication whose buckets are dropped one by one. ``--kl`` adds a reference.
Each stage has the resident size at its end and its highest; both are of the process, without the object store.

    python benchmarks/learner_memory.py MODEL_FOLDER
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

GIB = 2**30
SEQUENCES, PROMPT_TOKENS, NEW_TOKENS = 64, 40, 24
LIMIT_GIB = 6.0


def resident() -> tuple[float, float]:
    """Resident size of this process now and at its highest since the last call, in GiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    now, highest = (int(lines[name].split()[0]) * 1024 / GIB for name in ("VmRSS", "VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")  # The highest starts anew.
    return now, highest


def measure(path: str, *, kl_coef: float) -> dict[str, Any]:
    """Run the stages in this process."""
    stages: dict[str, dict[str, float]] = {}
    started = time.perf_counter()

    def stage(name: str) -> None:
        nonlocal started
        now, highest = resident()
        stages[name] = {"gib": now, "highest_gib": highest, "seconds": time.perf_counter() - started}
        print(f"{name:<16}{now:>8.2f} GiB, at its highest {highest:>6.2f} GiB {stages[name]['seconds']:>8.1f} s")
        started = time.perf_counter()

    import numpy as np
    import transformers  # noqa: F401
    from bare_loop import sequences_of, split
    from rank import learner_spec, one_rank

    from rlhf_ray import PPOConfig
    from rlhf_ray.learner import build
    from rlhf_ray.learner.learner import Learner

    stage("imports")
    config = PPOConfig().model(path=path).training(kl_coef=kl_coef).rollouts(max_new_tokens=NEW_TOKENS)
    after_each(build, "TrainedModel", stage, ("policy", "critic"))
    settings = config.settings
    with one_rank():
        learner = Learner(learner_spec(config, path))
        stage("reference" if kl_coef else "rest")
        rng = np.random.default_rng(0)
        lengths = np.full(SEQUENCES, NEW_TOKENS, dtype=np.int32)
        tokens = SEQUENCES * (PROMPT_TOKENS + NEW_TOKENS)
        batch = sequences_of(
            PROMPT_TOKENS,
            lengths,
            token_ids=rng.integers(10, 1000, size=tokens).astype(np.int32),
            rewards=rng.integers(0, 2, size=SEQUENCES).astype(np.float32),
        )
        own, rank, _ = split(
            batch,
            num_minibatches=settings.training.num_minibatches,
            max_tokens=settings.learners.max_tokens_per_microbatch,
        )
        learner.update(own, rank)
        stage("update")
        for _ in learner.weight_buckets():
            pass
        stage("publication")
    return {"stages": stages, "highest_gib": max(each["highest_gib"] for each in stages.values())}


def after_each(module: Any, name: str, stage: Callable[[str], None], names: tuple[str, ...]) -> None:
    """Report a stage after each call of one of the module's names."""
    original, left = getattr(module, name), iter(names)

    def reporting(*arguments: Any, **keywords: Any) -> Any:
        made = original(*arguments, **keywords)
        stage(next(left))
        return made

    setattr(module, name, reporting)


def main() -> None:
    """Measure without and with a reference, each in a process of its own; write results/learner_memory.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the model, as SmolLM2-135M's")
    parser.add_argument("--kl", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.kl is not None:
        print("RESULT", json.dumps(measure(arguments.model, kl_coef=arguments.kl)))
        return
    runs = {}
    for name, kl in (("without a reference", 0.0), ("with a reference", 0.1)):
        print(name)
        command = [sys.executable, __file__, arguments.model, "--kl", str(kl)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        shown, run = output.split("RESULT")
        print(shown)
        runs[name] = json.loads(run)
    from provenance import write_result

    fits = all(run["highest_gib"] < LIMIT_GIB for run in runs.values())
    print(f"{'within' if fits else 'beyond'} {LIMIT_GIB:g} GiB")
    result = {"sequences": SEQUENCES, "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "runs": runs}
    print("written to", write_result("learner_memory", result))


if __name__ == "__main__":
    main()
