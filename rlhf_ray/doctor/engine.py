"""Before a run: start a replica's engine with the run's own arguments, and let it write a few tokens."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from typing import Any

from rlhf_ray.doctor.check import Check, failed, passed
from rlhf_ray.doctor.child import ChildFailure, answer, run_child
from rlhf_ray.rollouts.engine import EngineSpec, RolloutEngine

__all__ = ["check_engine"]

_TOKENS = 8


def check_engine(spec: EngineSpec, *, timeout_s: float) -> Check:
    """Start the engine in a process of its own, as a replica does.

    Args:
        spec: What a replica of the run would be given.
        timeout_s: ``rollouts.startup_timeout_s``.
    """
    try:
        found = run_child("rlhf_ray.doctor.engine", spec, timeout_s=timeout_s, env=spec.env)
    except ChildFailure as failure:
        remedy = f"read {failure.log}; then correct model, rollouts or rollouts.engine_args"
        return failed("vLLM engine", failure.reason, remedy)
    if found["num_tokens"] != _TOKENS or not found["finite"]:
        detail = f"wrote {found['num_tokens']} of {_TOKENS} tokens, log-probabilities finite: {found['finite']}"
        return failed("vLLM engine", detail, "check the model's weights and model.dtype")
    detail = f"started in {found['startup_s']:.0f} s, wrote {_TOKENS} tokens in {found['generate_s']:.1f} s"
    return passed("vLLM engine", detail)


def _work(spec: EngineSpec) -> dict[str, Any]:
    return asyncio.run(_sample(spec))


async def _sample(spec: EngineSpec) -> dict[str, Any]:
    import numpy as np

    from rlhf_ray.types import Prompt, SamplingSettings

    started = time.perf_counter()
    # Without EOS the engine cannot stop early, whatever the model says.
    engine = RolloutEngine(dataclasses.replace(spec, eos_token_ids=()))
    await engine.start(version=0)
    ready = time.perf_counter()
    prompt = Prompt(prompt_id=0, token_ids=np.arange(1, 5, dtype=np.int32), text="")
    sampling = SamplingSettings(group_size=1, max_new_tokens=_TOKENS, temperature=1.0)
    completion = (await engine.generate(prompt, sampling, seed=0))[0]
    written = time.perf_counter()
    engine.shutdown()
    return {
        "startup_s": ready - started,
        "generate_s": written - ready,
        "num_tokens": len(completion.token_ids),
        "finite": all(math.isfinite(logprob) for logprob in completion.sampling_logprobs),
    }


if __name__ == "__main__":
    answer(_work)
