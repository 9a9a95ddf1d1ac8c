"""Parts (b) to (d) of gpu.py: one vLLM engine by itself, a colocated run, and what takes two GPUs."""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from gpu import Bench

from rlhf_ray import PPOConfig
from rlhf_ray.quickstart import model_path
from rlhf_ray.rollouts.engine import EngineSpec, RolloutEngine
from rlhf_ray.types import Prompt, SamplingSettings, Trajectory

PROMPTS, GROUP, TOKENS = 64, 8, 256
# Per token, against transformers in bfloat16: kernels round differently.
MEAN_WITHIN, LARGEST_WITHIN = 0.02, 0.5
_CLI = Path(sys.executable).with_name("rlhf-ray")
_RUN_TIMEOUT_S = 900.0


def run(bench: Bench) -> None:
    """Make all checks that take an engine, as far as there are GPUs."""
    gc.collect()
    if bench.on_gpu:
        torch.cuda.empty_cache()  # Of part (a), in this process.
    bench.run("engine", lambda bench: asyncio.run(engine(bench)))
    bench.run("colocated run", colocated)
    if bench.on_gpu and torch.cuda.device_count() > 1:
        bench.run("publication over NCCL", over_nccl)
        bench.run("publication through shared memory", through_shared_memory)
        bench.run("an engine is killed", killed_engine)
        bench.run("tensor parallel 2", tensor_parallel)


def spec(bench: Bench) -> EngineSpec:
    """As a replica's on this machine, for the quickstart's model."""
    from rlhf_ray.models.config import load_model_config
    from rlhf_ray.rollouts.engine_spec import engine_spec
    from rlhf_ray.types import Device

    path = model_path()
    rollouts = {"max_new_tokens": TOKENS, "group_size": GROUP, "gpu_memory_utilization": 0.5}
    dtype = "bfloat16" if bench.on_gpu else "float32"
    return engine_spec(
        PPOConfig().rollouts(**rollouts).data(batch_size=PROMPTS).settings,
        Device(on_gpu=bench.on_gpu, learners_on_gpu=False, colocated=False, dtype=dtype),
        model_path=path,
        tokenizer_path=path,
        config=load_model_config("model.path", path, trust_remote_code=False),
        eos_token_ids=(0,),
        prompt_tokens=64,
    )


async def engine(bench: Bench) -> dict[str, Any]:
    """Speed, seeds, log-probabilities against transformers, and a reload while sequences are in flight."""
    from transformers import AutoModelForCausalLM

    from rlhf_ray.weight_sync.buckets import gather_buckets
    from rlhf_ray.weight_sync.manifest import WeightManifest

    started = time.perf_counter()
    own = RolloutEngine(spec(bench))
    await own.start(version=0)
    found: dict[str, Any] = {"start_s": time.perf_counter() - started}
    rng = np.random.default_rng(0)
    dtype = torch.bfloat16 if bench.on_gpu else torch.float32
    whole = AutoModelForCausalLM.from_pretrained(model_path(), dtype=dtype).eval()
    vocabulary = whole.config.vocab_size
    prompts = [
        Prompt(prompt_id=i, token_ids=rng.integers(5, vocabulary, size=48).astype(np.int32), text="")
        for i in range(PROMPTS)
    ]
    sampling = SamplingSettings(
        group_size=GROUP, max_new_tokens=TOKENS, temperature=1.0, top_p=1.0, top_k=0, stop=(), stop_token_ids=()
    )

    async def sample(seed: int) -> list[tuple[Trajectory, ...]]:
        return await asyncio.gather(*(own.generate(each, sampling, seed=seed + each.prompt_id) for each in prompts))

    try:
        await sample(0)
        started = time.perf_counter()
        first = await sample(1000)
        seconds = time.perf_counter() - started
        again = await sample(1000)
        pairs = [(a, b) for some, others in zip(first, again, strict=True) for a, b in zip(some, others, strict=True)]
        found |= {
            "tokens_per_s": sum(len(a.token_ids) for a, _ in pairs) / seconds,
            # Kernels that depend on the batch make it less than 1 on a card.
            "same_under_the_same_seed": float(np.mean([np.array_equal(a.token_ids, b.token_ids) for a, b in pairs])),
            "before": distance(whole, prompts, first),
        }
        # Other weights, by the way of a replica that starts late, with CUDA graphs captured and requests running.
        with torch.no_grad():
            for weight in whole.parameters():
                weight.mul_(1.1)
        flying = asyncio.create_task(sample(2000))
        await asyncio.sleep(0.5)
        parts = list(gather_buckets(whole.named_parameters(), dtype=dtype, keep=True))
        manifest = WeightManifest(version=1, publication="other", buckets=tuple(layout for layout, _ in parts))
        await own.load_weights(manifest, [pieces or [] for _, pieces in parts])
        versions = sorted({span.version for group in await flying for each in group for span in each.version_spans})
        found |= {"pause_s": own.pause_s, "versions_in_flight": versions}
        found["after"] = distance(whole, prompts, await sample(3000))
    finally:
        own.shutdown()
    for when in ("before", "after"):
        close = found[when]["mean"] < MEAN_WITHIN and found[when]["largest"] < LARGEST_WITHIN
        bench.require(close, f"engine and transformers differ {when} new weights came: {found[when]}")
    return found


@torch.no_grad()  # type: ignore[untyped-decorator]
def distance(whole: Any, prompts: list[Prompt], groups: list[tuple[Trajectory, ...]]) -> dict[str, float]:
    """Of an engine's log-probabilities from those of transformers, over the first completion of some prompts."""
    differences = []
    for prompt, (completion, *_) in list(zip(prompts, groups, strict=True))[:8]:
        ids = torch.from_numpy(np.concatenate([prompt.token_ids, completion.token_ids]).astype(np.int64))
        logprobs = torch.log_softmax(whole(input_ids=ids[None]).logits[0, :-1].float(), dim=-1)
        chosen = logprobs.gather(-1, ids[1:, None])[len(prompt.token_ids) - 1 :, 0]
        differences.append(np.abs(chosen.numpy() - completion.sampling_logprobs))
    all_tokens = np.concatenate(differences)
    return {"mean": float(all_tokens.mean()), "largest": float(all_tokens.max())}


def train(bench: Bench, name: str, *overrides: str, kill_engine_after: int | None = None) -> list[dict[str, Any]]:
    """Run the quickstart by ``rlhf-ray train`` in a process of its own; returns the result of each iteration.

    Args:
        bench: Where to note that it failed.
        name: Of the run.
        overrides: Settings.
        kill_engine_after: Kill an engine's process once so many iterations are done.
    """
    folder = bench.scratch / name
    command = [str(_CLI), "train", "training.iterations=3", f"reporting.run_dir={folder}", *overrides]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    ends_at = time.monotonic() + _RUN_TIMEOUT_S
    try:
        while kill_engine_after is not None and process.poll() is None and time.monotonic() < ends_at:
            if len(results(folder)) >= kill_engine_after:
                engine_of(process.pid).kill()
                kill_engine_after = None
            time.sleep(0.2)
        output, _ = process.communicate(timeout=max(1.0, ends_at - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.terminate()
        output, _ = process.communicate()
    bench.require(process.returncode == 0, f"{name}: the run ended with {process.returncode}: {output[-2000:]}")
    return results(folder)


def results(folder: Path) -> list[dict[str, Any]]:
    """Of each iteration so far."""
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def engine_of(pid: int) -> psutil.Process:
    """One of a run's engine processes."""
    return next(p for p in psutil.Process(pid).children(recursive=True) if "EngineCore" in " ".join(p.cmdline()))


def summary(bench: Bench, name: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """What the iterations say, held against what must be so."""
    trained = [each for each in found if each["training_iteration"] > 0]
    differences = [each["learner/sampling_logprob_diff_mean"] for each in trained]
    bench.require(len(trained) > 0, f"{name}: no iteration was finished")
    bench.require(max(differences, default=0.0) < MEAN_WITHIN, f"{name}: log-probabilities differ: {differences}")
    return {
        "sampling_logprob_diff_mean": differences,
        "sampling_logprob_diff_max": [each["learner/sampling_logprob_diff_max"] for each in trained],
        "policy_versions": [each["learner/policy_version"] for each in trained],
        "timers": [{key: each[key] for key in each if key.startswith("timers/")} for each in trained],
    }


def colocated(bench: Bench) -> dict[str, Any]:
    """Three iterations of PPO with a critic in which replica and learner take turns on one GPU."""
    return summary(bench, "colocated", train(bench, "colocated", "resources.colocate=true", "training.kl_coef=0.01"))


def over_nccl(bench: Bench) -> dict[str, Any]:
    """The same on a GPU each, weights sent over NCCL."""
    return summary(bench, "nccl", train(bench, "nccl", "resources.colocate=false", "rollouts.weight_transfer=nccl"))


def through_shared_memory(bench: Bench) -> dict[str, Any]:
    """The same, weights through the object store."""
    overrides = ("resources.colocate=false", "rollouts.weight_transfer=shared_memory")
    return summary(bench, "shared_memory", train(bench, "shared_memory", *overrides))


def killed_engine(bench: Bench) -> dict[str, Any]:
    """An engine's process is killed: a new replica pulls its weights, and the next publication makes a new group."""
    overrides = ("resources.colocate=false", "training.iterations=12")
    found = train(bench, "killed", *overrides, kill_engine_after=2)
    restarts = found[-1]["fault_tolerance/replica_restarts"] if found else 0
    bench.require(restarts == 1, f"killed: {restarts} replicas were started for others")
    return summary(bench, "killed", found)


def tensor_parallel(bench: Bench) -> dict[str, Any]:
    """An engine over two GPUs, learners on CPUs."""
    overrides = ("resources.colocate=false", "rollouts.tensor_parallel_size=2", "learners.num_gpus_per_learner=0")
    return summary(bench, "tensor_parallel", train(bench, "tensor_parallel", *overrides))
