"""Where a quickstart iteration's time goes, beside the raw cost of the same work.

Runs the quickstart to a steady state, then in turn: an iteration; its prompts through a bare vLLM engine with the same
sampling settings; its microbatches through bare PyTorch models, the same passes, backward passes and optimizer steps,
without Ray, FSDP or our losses. In turn, since a machine's speed changes from minute to minute. The overhead is what an
iteration takes beyond the two, the median over all turns.

    python benchmarks/iteration_overhead.py [--iterations 20] [section.field=value ...]
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from provenance import write_result

WARM_UP = 4
PHASES = ("rollout_s", "reward_s", "advantage_s", "update_s", "weight_sync_s", "iteration_s")


class RawStage:
    """A measurement of raw work in a process of its own, which waits until it is asked for a turn."""

    def __init__(self, stage: str, folder: Path) -> None:
        command = [sys.executable, __file__, "--stage", stage, "--folder", str(folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.turn()

    def turn(self) -> float:
        """Seconds of the work, done once more."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("RESULT"):
                return float(line.split()[1])
        raise RuntimeError(f"the raw measurement ended with {self._process.wait()}")

    def stop(self) -> None:
        """End the process."""
        self._process.communicate()


def turns_asked_for() -> Iterator[int]:
    """The other end of :class:`RawStage`: numbers of the turns, until no more are wanted."""
    for number, _ in enumerate(sys.stdin):
        yield number


def measure(overrides: list[str], iterations: int, folder: Path) -> list[dict[str, float]]:
    """Seconds of every phase and of the raw work, a dictionary a turn."""
    from rlhf_ray import PPOConfig
    from rlhf_ray.stopping import stop_all

    config = PPOConfig().reporting(run_dir=str(folder / "run"), progress="off").apply_overrides(overrides)
    algorithm = config.build_algo()
    stages: dict[str, RawStage] = {}
    turns = []
    try:
        for _ in range(WARM_UP):
            algorithm.train()
        algorithm.export_hf(folder / "policy")
        (folder / "config.yaml").write_text(algorithm.algorithm_config.to_yaml())
        stages |= {stage: RawStage(stage, folder) for stage in ("generation", "training")}
        for turn in range(WARM_UP + iterations):
            raw = {stage: process.turn() for stage, process in stages.items()}
            timers = algorithm.train()["timers"]
            if turn >= WARM_UP:
                turns.append({phase: timers[phase] for phase in PHASES} | raw)
    finally:
        stop_all(*((stage, process.stop) for stage, process in stages.items()), ("algorithm", algorithm.stop))
    return turns


def raw_generation(folder: Path) -> None:
    """A bare engine answers an iteration's prompts, one turn after the other."""
    from rlhf_ray import PPOConfig
    from rlhf_ray.algorithm.inputs import check_inputs
    from rlhf_ray.rollouts.engine_spec import engine_spec
    from rlhf_ray.rollouts.flow import training_sampling
    from rlhf_ray.rollouts.rollouter import group_seed
    from rlhf_ray.types import Device

    settings = PPOConfig.from_yaml(folder / "config.yaml").settings
    inputs = check_inputs(settings)
    spec = engine_spec(
        settings,
        Device(on_gpu=False, learners_on_gpu=False, colocated=False, dtype="float32"),
        model_path=str(folder / "policy"),
        tokenizer_path=str(folder / "policy"),
        config=inputs.model_config,
        eos_token_ids=inputs.eos_token_ids,
        prompt_tokens=inputs.max_prompt_tokens,
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

    async def all_prompts(engine: Any, repeat: int) -> float:
        await engine.reset_prefix_cache()
        started = time.perf_counter()
        await asyncio.gather(*(one(engine, index, repeat) for index in range(len(prompts))))
        return time.perf_counter() - started

    with asyncio.Runner() as runner:

        async def start() -> Any:
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**spec.engine_args))

        engine = runner.run(start())
        for repeat in turns_asked_for():
            print("RESULT", runner.run(all_prompts(engine, repeat)), flush=True)
        engine.shutdown()
        del engine  # Or its finalizer would find vLLM's modules gone.


def raw_training(folder: Path) -> None:
    """The same passes and optimizer steps on bare PyTorch models, one turn after the other."""
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
    for _ in turns_asked_for():
        started = time.perf_counter()
        bare.planned(minibatches, epochs=training.num_epochs)
        print("RESULT", time.perf_counter() - started, flush=True)


def _completions(folder: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.read_table(sorted((folder / "run" / "completions").glob("*.parquet"))[-1]).to_pydict()


def _prompt_tokens(folder: Path) -> list[list[int]]:
    from rlhf_ray.prompts.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(folder / "policy"))
    table = _completions(folder)
    by_group = dict(zip(table["group_id"], table["prompt"], strict=True))
    return [tokenizer(text).input_ids for text in by_group.values()]


def main() -> None:
    """Measure, print a table, write results/iteration_overhead.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="section.field=value")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--stage", choices=["generation", "training"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage is not None:
        raw = raw_generation if arguments.stage == "generation" else raw_training
        raw(arguments.folder)
        return
    with tempfile.TemporaryDirectory() as name:
        turns = measure(arguments.overrides, arguments.iterations, Path(name))
    median = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
    overheads = [turn["iteration_s"] - turn["generation"] - turn["training"] for turn in turns]
    overhead = statistics.median(overheads)
    rows = [
        ("rollout + reward", median["rollout_s"] + median["reward_s"], "raw vLLM generation", median["generation"]),
        ("advantage + update", median["advantage_s"] + median["update_s"], "raw training", median["training"]),
        ("weight sync", median["weight_sync_s"], "", 0.0),
        ("whole iteration", median["iteration_s"], "raw work", median["generation"] + median["training"]),
    ]
    print(f"{'phase':<22}{'seconds':>9}   {'raw':<24}{'seconds':>9}{'beyond raw':>13}")
    for phase, seconds, raw_name, raw_seconds in rows:
        print(f"{phase:<22}{seconds:>9.3f}   {raw_name:<24}{raw_seconds:>9.3f}{seconds - raw_seconds:>13.3f}")
    print(f"overhead of everything else: {overhead * 1000:.0f} ms an iteration, of {len(turns)} turns:")
    print(" ".join(f"{value * 1000:.0f}" for value in sorted(overheads)))
    result = {"median_s": median, "overhead_s": overhead, "turns": turns}
    print("written to", write_result("iteration_overhead", {"iterations": arguments.iterations} | result))


if __name__ == "__main__":
    main()
