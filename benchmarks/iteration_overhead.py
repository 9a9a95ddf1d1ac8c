"""Where a quickstart iteration's time goes, beside the raw cost of the same work.

Runs the quickstart to a steady state and takes the median of each phase. Then, with all stopped, the same prompts
go through a bare vLLM engine with the same sampling settings, and the same microbatches through bare PyTorch models:
the same passes, backward passes and optimiser steps, without Ray, FSDP or our losses. What an iteration takes beyond
these two is overhead.

    python benchmarks/iteration_overhead.py [--iterations 12] [section.field=value ...]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from provenance import write_result

WARM_UP = 4
PHASES = ("rollout_s", "reward_s", "advantage_s", "update_s", "weight_sync_s", "iteration_s")


def measure_loop(overrides: list[str], iterations: int, folder: Path) -> dict[str, float]:
    """Median seconds of each phase; leaves the exported policy and the completions in ``folder``."""
    from rlhf_ray import PPOConfig

    config = PPOConfig().reporting(run_dir=str(folder / "run"), progress="off").apply_overrides(overrides)
    algorithm = config.build_algo()
    try:
        results = [algorithm.train()["timers"] for _ in range(WARM_UP + iterations)][WARM_UP:]
        algorithm.export_hf(folder / "policy")
        resolved = algorithm.algorithm_config.to_yaml()
    finally:
        algorithm.stop()
    (folder / "config.yaml").write_text(resolved)
    return {phase: statistics.median(timers[phase] for timers in results) for phase in PHASES}


def raw_generation(folder: Path, repeats: int) -> float:
    """Median seconds in which a bare engine answers the last iteration's prompts."""
    from rlhf_ray import PPOConfig
    from rlhf_ray.algorithms.assembly import check_inputs, training_sampling
    from rlhf_ray.rollouts.engine_spec import engine_spec
    from rlhf_ray.rollouts.seeds import group_seed

    settings = PPOConfig.from_yaml(folder / "config.yaml").settings
    inputs = check_inputs(settings)
    spec = engine_spec(
        settings.model,
        settings.rollouts,
        model_path=str(folder / "policy"),
        tokenizer_path=str(folder / "policy"),
        config=inputs.model_config,
        prompt_tokens=inputs.max_prompt_tokens,
        groups_in_flight=settings.data.batch_size,
        seed=0,
        on_gpu=False,
        dtype="float32",
    )
    os.environ.update(spec.env)
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    sampling = training_sampling(settings)
    prompts = _prompt_tokens(folder)

    async def one(engine: Any, index: int, repeat: int) -> None:
        params = SamplingParams(
            n=sampling.group_size,
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            seed=group_seed(0, repeat, index),
            stop_token_ids=list(spec.eos_token_ids),
            ignore_eos=True,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        async for _ in engine.generate({"prompt_token_ids": prompts[index]}, params, f"{repeat}-{index}"):
            pass

    async def run() -> list[float]:
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**spec.engine_args))
        times = []
        for repeat in range(repeats + 2):
            await engine.reset_prefix_cache()
            started = time.perf_counter()
            await asyncio.gather(*(one(engine, index, repeat) for index in range(len(prompts))))
            times.append(time.perf_counter() - started)
        engine.shutdown()
        return times[2:]

    return statistics.median(asyncio.run(run()))


def raw_training(folder: Path, repeats: int) -> float:
    """Median seconds of the same passes and optimiser steps on bare PyTorch models."""
    import torch
    from bare_loop import BareLoop, sequences_of, split

    from rlhf_ray import PPOConfig

    settings = PPOConfig.from_yaml(folder / "config.yaml").settings
    training = settings.training
    if settings.learners.num_threads is not None:
        torch.set_num_threads(settings.learners.num_threads)
    # The lengths of the last iteration.
    batch = sequences_of(len(_prompt_tokens(folder)[0]), np.asarray(_completions(folder)["num_tokens"], dtype=np.int32))
    _, _, minibatches = split(
        batch,
        num_minibatches=training.num_minibatches,
        max_tokens=settings.learners.max_tokens_per_microbatch,
        num_epochs=training.num_epochs,
    )
    bare = BareLoop(str(folder / "policy"), critic=True)
    times = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        bare.planned(minibatches, epochs=training.num_epochs)
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def _completions(folder: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.read_table(sorted((folder / "run" / "completions").glob("*.parquet"))[-1]).to_pydict()


def _prompt_tokens(folder: Path) -> list[list[int]]:
    from rlhf_ray.prompts.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(folder / "policy"))
    table = _completions(folder)
    by_group = dict(zip(table["group_id"], table["prompt"], strict=True))
    return [tokenizer(text).input_ids for text in by_group.values()]


def in_process_of_its_own(stage: str, folder: Path, repeats: int) -> float:
    """Run one raw measurement with fresh thread pools and nothing else in memory."""
    command = [sys.executable, __file__, "--stage", stage, "--folder", str(folder), "--iterations", str(repeats)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(output.split("RESULT")[-1])


def main() -> None:
    """Measure, print a table, write results/iteration_overhead.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="section.field=value")
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--stage", choices=["generation", "training"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage is not None:
        raw = raw_generation if arguments.stage == "generation" else raw_training
        print("RESULT", raw(arguments.folder, arguments.iterations))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        phases = measure_loop(arguments.overrides, arguments.iterations, folder)
        generation = in_process_of_its_own("generation", folder, arguments.iterations)
        training = in_process_of_its_own("training", folder, arguments.iterations)
    overhead = phases["iteration_s"] - generation - training
    rows = [
        ("rollout + reward", phases["rollout_s"] + phases["reward_s"], "raw vLLM generation", generation),
        ("advantage + update", phases["advantage_s"] + phases["update_s"], "raw forward + backward", training),
        ("weight sync", phases["weight_sync_s"], "", 0.0),
        ("whole iteration", phases["iteration_s"], "raw work", generation + training),
    ]
    print(f"{'phase':<22}{'seconds':>9}   {'raw':<24}{'seconds':>9}{'beyond raw':>13}")
    for phase, seconds, raw_name, raw_seconds in rows:
        print(f"{phase:<22}{seconds:>9.3f}   {raw_name:<24}{raw_seconds:>9.3f}{seconds - raw_seconds:>13.3f}")
    print(f"overhead of everything else: {overhead * 1000:.0f} ms an iteration")
    result = {"phases_s": phases, "raw_generation_s": generation, "raw_training_s": training, "overhead_s": overhead}
    print("written to", write_result("iteration_overhead", {"iterations": arguments.iterations} | result))


if __name__ == "__main__":
    main()
