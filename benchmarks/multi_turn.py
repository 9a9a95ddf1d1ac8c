"""Rollouts of several turns beside the raw cost of their tokens, and what a turn costs beyond its tokens.

    python benchmarks/multi_turn.py [--trajectories 256] [--turns 4] [--tokens 64] [--repeats 5]

(a) A run's rollouts, rewards included, and a bare vLLM engine that samples as many tokens in the same turns, each as
    soon as the one before is there. In turn, with the same settings.
(b) The same loop over an engine that answers at once: milliseconds of the driver and of the worker per turn.
(c) Episodes in flight in one worker process whose steps wait: how long all take beside the sum of one's waits.
(d) Asynchronous beside synchronous iterations, where steps take long-tailed times.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from provenance import write_result

from rlhf_ray.environments.environment import Action, Environment, Step

GROUP = 4
OBSERVED = "0123456789abcdef"


class Reader(Environment):
    """Answers every turn with 16 tokens, after a wait."""

    def __init__(self, turns: int, wait_s: float = 0.0, tail: float = 0.0) -> None:
        self._left = turns
        self._wait_s = wait_s
        self._tail = tail

    def reset(self, row: Mapping[str, Any], seed: int) -> None:
        """Keep the row's prompt."""
        self._random = random.Random(seed)

    async def step(self, action: Action) -> Step:  # type: ignore[override]
        """Wait and answer."""
        self._left -= 1
        wait_s = self._wait_s * (self._random.paretovariate(self._tail) if self._tail else 1.0)
        if wait_s:
            await asyncio.sleep(min(wait_s, 20 * self._wait_s))
        return Step(observation=OBSERVED, reward=float(len(action.token_ids)), done=self._left == 0)


def config_of(folder: Path, arguments: argparse.Namespace, **environment: Any) -> Any:
    """A run whose turns are nearly all as long as they may be: its model has learned nothing, and ends few."""
    from rlhf_ray import GRPOConfig

    length = arguments.turns * (arguments.tokens + len(OBSERVED))
    return (
        GRPOConfig()
        .model(path=str(folder / "model"))
        .data(path="rlhf_ray.quickstart.task:train_rows", batch_size=arguments.trajectories // GROUP)
        .rollouts(group_size=GROUP, max_prompt_tokens=16, max_new_tokens=length)
        .environment(
            {"name": Reader, "turns": arguments.turns, **environment},
            max_turns=arguments.turns,
            max_turn_tokens=arguments.tokens,
        )
        .training(num_minibatches=1, lr=1e-6)
        .learners(gradient_checkpointing=False)
        .reporting(run_dir=str(folder / f"run{time.time_ns()}"), progress="off", tensorboard=False)
    )


async def raw(engine: Any, eos_token_ids: Sequence[int], groups: Sequence[Any], repeat: int) -> float:
    """Sample the tokens of recorded groups once more with a bare engine, turn after turn; returns seconds."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    async def sample(prompt: list[int], length: int, name: str) -> None:
        params = SamplingParams(
            max_tokens=length,
            min_tokens=length,
            temperature=1.0,
            seed=repeat,
            ignore_eos=True,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        async for _ in engine.generate({"prompt_token_ids": prompt, "cache_salt": str(repeat)}, params, name):
            pass

    async def one(prompt: list[int], trajectory: Any, name: str) -> None:
        for number, turn in enumerate(trajectory.turns):
            prefix = [*prompt, *trajectory.token_ids[: turn.start].tolist()]
            await sample(prefix, turn.end - turn.start, f"{name}-{number}")

    started = time.perf_counter()
    await asyncio.gather(
        *(
            one(group.prompt.token_ids.tolist(), trajectory, f"{repeat}-{index}-{i}")
            for index, group in enumerate(groups)
            for i, trajectory in enumerate(group.trajectories)
        )
    )
    return time.perf_counter() - started


def against_raw(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """(a)."""
    algorithm = config_of(folder, arguments).build_algo()
    spec = algorithm._parts.app._spec
    os.environ.update(spec.env)
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    ratios, ours_s, raw_s, tokens = [], [], [], []
    try:
        prompts = [next(algorithm._parts.prompts) for _ in range(arguments.trajectories // GROUP)]
        sampling = algorithm._parts.controller._flow.engine.sampling
        with asyncio.Runner() as runner:

            async def start() -> Any:
                return AsyncLLM.from_engine_args(AsyncEngineArgs(**spec.engine_args))

            engine = runner.run(start())
            for repeat in range(arguments.repeats + 1):
                started = time.perf_counter()
                scored = algorithm._parts.controller.score_prompts(prompts, sampling, 0)
                seconds = time.perf_counter() - started
                groups = [one.group for one in scored]
                bare = runner.run(raw(engine, spec.eos_token_ids, groups, repeat))
                if repeat == 0:
                    continue
                ours_s.append(seconds)
                raw_s.append(bare)
                ratios.append(bare / seconds)
                tokens.append(sum(int(each.loss_mask.sum()) for group in groups for each in group.trajectories))
            engine.shutdown()
            del engine
    finally:
        algorithm.stop()
    return {
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "seconds": statistics.median(ours_s),
        "raw_seconds": statistics.median(raw_s),
        "tokens_per_s": statistics.median(n / s for n, s in zip(tokens, ours_s, strict=True)),
        "raw_tokens_per_s": statistics.median(n / s for n, s in zip(tokens, raw_s, strict=True)),
        "sampled_tokens": statistics.median(tokens),
    }


def instant_engine(tokens: int) -> Any:
    """An engine that answers at once."""
    from rlhf_ray.rollouts.rollouter import Engine
    from rlhf_ray.types import RolloutGroup, SamplingSettings, Trajectory, VersionSpan

    ids = np.full(tokens, 48, dtype=np.int32)
    completion = Trajectory.single_turn(
        token_ids=ids,
        sampling_logprobs=np.full(tokens, -1.0, dtype=np.float32),
        version_spans=(VersionSpan(version=0, start=0, end=tokens),),
        asked_version=0,
        finish_reason="stop",
    )

    async def generate(prompt: Any, sampling: Any, **_: Any) -> Any:
        await asyncio.sleep(0)
        return RolloutGroup(
            group_id=prompt.prompt_id,
            prompt=prompt,
            trajectories=(completion,) * sampling.group_size,
            replica_id="r",
        )

    sampling = SamplingSettings(group_size=GROUP, max_new_tokens=10_000, temperature=1.0)
    return Engine(generate=generate, sampling=sampling, max_retries=0, timeout_s=600.0)


def alone(arguments: argparse.Namespace, groups: int, **environment: Any) -> dict[str, float]:
    """Rollouts of one worker over an engine that answers at once: seconds, and CPU seconds of this process."""
    from rlhf_ray.config.settings import EnvironmentSettings
    from rlhf_ray.environments.pool import EnvironmentPool, PoolSettings
    from rlhf_ray.environments.registry import resolve_environments
    from rlhf_ray.environments.worker import WorkerSettings
    from rlhf_ray.quickstart import model_path
    from rlhf_ray.rollouts.episodes import MultiTurn, TurnLimits
    from rlhf_ray.rollouts.rollouter import Seeds
    from rlhf_ray.types import Prompt

    spec = {"name": Reader, "turns": arguments.turns, **environment}
    named = resolve_environments(EnvironmentSettings(name=spec))
    worker = WorkerSettings(
        environments=tuple(one.serialized() for one in named),
        tokenizer=model_path(),
        trust_remote_code=False,
        chat_template=None,
    )
    pool = EnvironmentPool(
        PoolSettings(
            worker=worker,
            deterministic=frozenset({"Reader"}),
            num_workers=1,
            num_cpus=0.1,
            step_timeout_s=600.0,
            startup_timeout_s=120.0,
        )
    )
    pool.start()
    limits = TurnLimits(
        max_turns=arguments.turns, max_turn_tokens=arguments.tokens, max_prompt_tokens=100, timeout_s=600.0
    )
    rollouter = MultiTurn(pool, limits, names=["Reader"])
    engine = instant_engine(arguments.tokens)

    async def all_groups() -> tuple[float, float]:
        started, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(
            *(
                rollouter.rollout(
                    Prompt(prompt_id=number, token_ids=np.asarray([49, 43, 49, 61], dtype=np.int32), text="1+1="),
                    engine,
                    Seeds(run_seed=0, version=0, prompt_id=number),
                )
                for number in range(groups)
            )
        )
        return time.perf_counter() - started, time.process_time() - cpu

    async def twice() -> tuple[float, float]:
        await all_groups()  # The first starts threads and loads what is loaded lazily.
        return await all_groups()

    try:
        seconds, cpu_s = asyncio.run(twice())
    finally:
        pool.stop()
    turns = groups * GROUP * arguments.turns
    return {"turn_ms": seconds / turns * 1e3, "driver_cpu_ms": cpu_s / turns * 1e3, "seconds": seconds}


def iterations_s(folder: Path, arguments: argparse.Namespace, max_staleness: int) -> float:
    """(d): median seconds of an iteration whose steps take long-tailed times."""
    small = argparse.Namespace(**{**vars(arguments), "trajectories": 64, "tokens": 16})
    config = config_of(folder, small, wait_s=0.2, tail=1.2).rollouts(max_staleness=max_staleness)
    algorithm = config.build_algo()
    try:
        for _ in range(3):
            algorithm.train()
        started = time.perf_counter()
        for _ in range(10):
            algorithm.train()
        return (time.perf_counter() - started) / 10
    finally:
        algorithm.stop()


def main() -> None:
    """Measure all parts and write results/multi_turn.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", type=int, default=256)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    import ray

    from rlhf_ray.quickstart.make_model import new_model
    from rlhf_ray.quickstart.tokenizer import build_tokenizer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        new_model(seed=0).save_pretrained(folder / "model")
        build_tokenizer(max_length=2048).save_pretrained(folder / "model")
        ray.init(log_to_driver=False)
        result: dict[str, Any] = {"settings": vars(arguments)}
        result["against_raw"] = against_raw(folder, arguments)
        result["overhead"] = alone(arguments, arguments.trajectories // GROUP)
        waits = {count: alone(arguments, count // GROUP, wait_s=0.5) for count in (4, 500, 1000)}
        result["in_flight"] = {str(count): measured["seconds"] for count, measured in waits.items()}
        result["long_tail_s"] = {
            "synchronous": iterations_s(folder, arguments, 0),
            "max_staleness 2": iterations_s(folder, arguments, 2),
        }
    for part, measured in result.items():
        print(f"{part}: {measured}")
    print("written to", write_result("multi_turn", result))


if __name__ == "__main__":
    main()
