"""Whether a replica's engine starts with the run's own arguments and generates a few tokens."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time

import numpy as np

from rlhf_ray.doctor.check import Check
from rlhf_ray.doctor.child import ChildFailure, call_in_child
from rlhf_ray.rollouts.engine import EngineSpec, RolloutEngine
from rlhf_ray.types import Prompt, SamplingSettings, Trajectory

__all__ = ["check_engine", "judge_sample"]

_NAME = "vLLM engine"
_TOKENS = 8


def check_engine(spec: EngineSpec, *, timeout_s: float) -> Check:
    """Start the engine in a process of its own, as a replica does.

    Args:
        spec: What a replica of the run would be given.
        timeout_s: ``rollouts.startup_timeout_s``.
    """
    try:
        return call_in_child(_started, spec, timeout_s=timeout_s, env=spec.env)
    except ChildFailure as failure:
        remedy = f"read {failure.log}; then correct model, rollouts or rollouts.engine_args"
        return Check(_NAME, "fail", failure.reason, remedy)


def judge_sample(trajectory: Trajectory, *, startup_s: float, generate_s: float) -> Check:
    """Check what an engine generated."""
    num_tokens, finite = len(trajectory.token_ids), all(map(math.isfinite, trajectory.sampling_logprobs))
    if num_tokens != _TOKENS or not finite:
        detail = f"wrote {num_tokens} of {_TOKENS} tokens, log-probabilities finite: {finite}"
        return Check(_NAME, "fail", detail, "check the model's weights and model.dtype")
    return Check(_NAME, "ok", f"started in {startup_s:.0f} s, wrote {_TOKENS} tokens in {generate_s:.1f} s")


def _started(spec: EngineSpec) -> Check:
    return asyncio.run(_sampled(spec))


async def _sampled(spec: EngineSpec) -> Check:
    started = time.perf_counter()
    # Without EOS the engine cannot stop early, whatever the model says.
    engine = RolloutEngine(dataclasses.replace(spec, eos_token_ids=()))
    await engine.start(version=0)
    ready = time.perf_counter()
    prompt = Prompt(prompt_id=0, token_ids=np.arange(1, 5, dtype=np.int32), text="")
    sampling = SamplingSettings(group_size=1, max_new_tokens=_TOKENS, temperature=1.0)
    (trajectory,) = await engine.generate(prompt, sampling, seed=0)
    generate_s = time.perf_counter() - ready
    engine.shutdown()
    return judge_sample(trajectory, startup_s=ready - started, generate_s=generate_s)
