"""Part (b) of gpu.py: one vLLM engine without Ray, as a replica starts it."""

from __future__ import annotations

import asyncio
import gc
import time
from typing import Any

import numpy as np
import torch
from gpu import Bench
from gpu_learner import SMALL, model

from rlhf_ray import PPOConfig
from rlhf_ray.quickstart import model_path
from rlhf_ray.rollouts.engine import EngineSpec, RolloutEngine
from rlhf_ray.types import Prompt, SamplingSettings, Trajectory

# Per token, against transformers in bfloat16: kernels round differently.
MEAN_WITHIN, LARGEST_WITHIN = 0.02, 0.5
# What vLLM takes by default on a GPU for throughput; for a server it takes less.
_LEAST_STEP_TOKENS = 8192
_GPU_SHARE = 0.5
_Groups = list[tuple[Trajectory, ...]]


def engine_checks(bench: Bench) -> None:
    """Make all checks of one engine."""
    bench.run("engine of its own GPU", lambda bench: asyncio.run(engine(bench)))
    gc.collect()
    bench.run("engine that sleeps", lambda bench: asyncio.run(sleeping_engine(bench)))


class Sampler:
    """An engine, prompts for it, and a model of transformers with the weights that the engine should have."""

    def __init__(self, bench: Bench, *, colocated: bool) -> None:
        from transformers import AutoModelForCausalLM

        path = model(bench, SMALL)
        count, group_size, self._tokens = (8, 2, 32) if bench.tiny else (64, 8, 512)
        self.bench, self.dtype = bench, torch.bfloat16 if bench.on_gpu else torch.float32
        self.spec = spec(bench, path, group_size=group_size, groups=count, tokens=self._tokens, colocated=colocated)
        before = bench.used_gib()
        self.engine, self.start_s = bench.timed(lambda: RolloutEngine(self.spec))
        self.engine_gib = bench.used_gib() - before
        self.whole = AutoModelForCausalLM.from_pretrained(path, dtype=self.dtype).eval()
        rng = np.random.default_rng(0)
        vocabulary = self.whole.config.vocab_size
        self._prompts = [
            Prompt(prompt_id=i, token_ids=rng.integers(5, vocabulary, size=48).astype(np.int32), text="")
            for i in range(count)
        ]
        self._sampling = SamplingSettings(
            group_size=group_size,
            max_new_tokens=self._tokens,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            stop=(),
            stop_token_ids=(),
        )

    async def sample(self, seed: int) -> _Groups:
        """All prompts at once; a prompt's seeds are the same whenever it is called with this one."""
        groups = (
            self.engine.generate(each, self._sampling, seed=seed + 100 * each.prompt_id) for each in self._prompts
        )
        return list(await asyncio.gather(*groups))

    async def load_others(self, version: int) -> None:
        """Load other weights by the way of a replica that starts late: through shared memory."""
        from rlhf_ray.weight_sync.buckets import gather_buckets
        from rlhf_ray.weight_sync.manifest import WeightManifest

        with torch.no_grad():
            for weight in self.whole.parameters():
                weight.copy_(weight.flip(0))
        parts = list(gather_buckets(self.whole.named_parameters(), dtype=self.dtype, keep=True))
        buckets = tuple(layout for layout, _ in parts)
        manifest = WeightManifest(version=version, publication=f"weights-{version}", buckets=buckets)
        await self.engine.load_weights(manifest, [pieces or [] for _, pieces in parts])

    def check_logprobs(self, when: str, groups: _Groups) -> None:
        """Expect the log-probabilities of transformers."""
        apart = self.apart(groups)
        self.bench.at_most(f"{when}: mean distance of log-probabilities", float(apart.mean()), MEAN_WITHIN)
        self.bench.at_most(f"{when}: largest distance of log-probabilities", float(apart.max()), LARGEST_WITHIN)

    def apart(self, groups: _Groups) -> torch.Tensor:
        """Distance of each token's log-probability from that of transformers, in the first completion of a few."""
        differences = []
        for prompt, (completion, *_) in list(zip(self._prompts, groups, strict=True))[:8]:
            ids = torch.from_numpy(np.concatenate([prompt.token_ids, completion.token_ids]).astype(np.int64))
            with torch.no_grad():
                logprobs = torch.log_softmax(self.whole(input_ids=ids[None]).logits[0, :-1].float(), dim=-1)
            chosen = logprobs.gather(-1, ids[1:, None])[len(prompt.token_ids) - 1 :, 0]
            differences.append((chosen - torch.from_numpy(completion.sampling_logprobs)).abs())
        return torch.cat(differences)


def spec(bench: Bench, path: str, *, group_size: int, groups: int, tokens: int, colocated: bool) -> EngineSpec:
    """As a replica's on this machine."""
    from rlhf_ray.models.config import load_model_config
    from rlhf_ray.rollouts.engine_spec import engine_spec

    config = PPOConfig().rollouts(max_new_tokens=tokens, group_size=group_size, gpu_memory_utilization=_GPU_SHARE)
    settings = config.settings
    return engine_spec(
        settings.model,
        settings.rollouts,
        settings.evaluation,
        model_path=path,
        tokenizer_path=model_path(),
        config=load_model_config("model.path", path, trust_remote_code=False),
        eos_token_ids=(0,),
        prompt_tokens=64,
        groups_in_flight=groups,
        seed=0,
        on_gpu=bench.on_gpu,
        learners_on_gpu=False,
        dtype="bfloat16" if bench.on_gpu else "float32",
        colocated=colocated,
    )


async def engine(bench: Bench) -> dict[str, Any]:
    """Arguments, speed, seeds, log-probabilities, and a reload while sequences are in flight."""
    sampler = Sampler(bench, colocated=False)
    try:
        await sampler.engine.start(version=0)
        check_arguments(bench, sampler)
        await sampler.sample(0)
        started = time.perf_counter()
        first = await sampler.sample(1)
        seconds = time.perf_counter() - started
        again = await sampler.sample(1)
        pairs = [(a, b) for some, others in zip(first, again, strict=True) for a, b in zip(some, others, strict=True)]
        sampler.check_logprobs("before new weights", first)
        # CUDA graphs are captured, and requests are running.
        flying = asyncio.create_task(sampler.sample(2))
        await asyncio.sleep(0.1 if bench.tiny else 0.5)
        await sampler.load_others(1)
        versions = sorted({span.version for group in await flying for each in group for span in each.version_spans})
        bench.expect("versions of what was in flight", versions, [0, 1])
        sampler.check_logprobs("after new weights", await sampler.sample(3))
        # Else an engine that kept the old ones would pass.
        bench.at_least("mean distance of the old weights", float(sampler.apart(first).mean()), 10 * MEAN_WITHIN)
    finally:
        sampler.engine.shutdown()
    return {
        "start_s": sampler.start_s,
        "gib": sampler.engine_gib,
        "tokens_per_s": sum(len(a.token_ids) for a, _ in pairs) / seconds,
        # Kernels that depend on the batch make it less than 1 on a card.
        "same_under_the_same_seed": float(np.mean([np.array_equal(a.token_ids, b.token_ids) for a, b in pairs])),
        "pause_s": sampler.engine.pause_s,
    }


def check_arguments(bench: Bench, sampler: Sampler) -> None:
    """Expect what the engine made of its arguments to be what the settings ask for."""
    config, asked = sampler.engine._engine.vllm_config, sampler.spec.engine_args
    for name, seen in (
        ("max_num_seqs", config.scheduler_config.max_num_seqs),
        ("max_model_len", config.model_config.max_model_len),
        ("dtype", str(config.model_config.dtype).removeprefix("torch.")),
        ("seed", config.model_config.seed),
        ("logprobs_mode", config.model_config.logprobs_mode),
        ("enforce_eager", config.model_config.enforce_eager),
        ("backend", config.weight_transfer_config.backend),
    ):
        bench.expect(name, seen, asked["weight_transfer_config"][name] if name == "backend" else asked[name])
    # Where the settings name none, the usage context that the engine is built with decides.
    least = asked.get("max_num_batched_tokens", _LEAST_STEP_TOKENS)
    bench.at_least("max_num_batched_tokens", config.scheduler_config.max_num_batched_tokens, least)
    graphs = config.compilation_config.cudagraph_mode.name
    bench.expect("CUDA graphs are captured", graphs != "NONE", bench.on_gpu)


async def sleeping_engine(bench: Bench) -> dict[str, Any]:
    """One turn of a learner: the engine sleeps with sequences in flight, wakes without its cache, loads, resumes."""
    sampler = Sampler(bench, colocated=True)
    own, measured, before = sampler.engine, {}, 0.0

    async def step(name: str, act: Any) -> None:
        nonlocal before
        started = time.perf_counter()
        await act
        used = bench.used_gib()
        measured[name] = {"seconds": time.perf_counter() - started, "freed_gib": before - used}
        before = used

    try:
        await own.start(version=0)
        await sampler.sample(0)
        before = bench.used_gib()
        flying = asyncio.create_task(sampler.sample(1))
        await asyncio.sleep(0.1 if bench.tiny else 0.5)
        await step("sleep, level 1", own.sleep())
        bench.expect("asleep", await own._engine.is_sleeping(), True)
        await step("wake weights", own.wake_weights())
        await step("load", sampler.load_others(1))
        await step("wake kv_cache", own.wake())
        versions = sorted({span.version for group in await flying for each in group for span in each.version_spans})
        bench.expect("versions of what was in flight", versions, [0, 1])
        sampler.check_logprobs("after the turn", await sampler.sample(2))
    finally:
        own.shutdown()
    if bench.on_gpu:  # An engine on a CPU keeps its memory.
        freed = measured["sleep, level 1"]["freed_gib"]
        bench.at_least("share of its memory that a sleeping engine frees", freed / sampler.engine_gib, 0.8)
    return measured | {"gib": sampler.engine_gib}
