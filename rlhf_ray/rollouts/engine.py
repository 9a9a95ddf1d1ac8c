"""The sampling engine of one replica: vLLM's ``AsyncLLM`` behind prompts in, completions out, weights in.

Plain class, no Ray: the Serve deployment (replica.py) constructs it and forwards to it.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_ray.errors import ConfigError, RolloutError
from rlhf_ray.rollouts.message_parser import MessageParser
from rlhf_ray.types import ChatMessage, Prompt, SamplingSettings, Trajectory, Turn, VersionSpan
from rlhf_ray.untrusted_text import shortened
from rlhf_ray.weight_sync.buckets import ByteArray
from rlhf_ray.weight_sync.manifest import WeightManifest
from rlhf_ray.weight_sync.shared_buckets import SharedBuckets

__all__ = ["EngineSpec", "RolloutEngine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """What a replica needs to start its engine; made once on the driver (engine_spec.py)."""

    engine_args: dict[str, Any]
    """Keyword arguments of ``vllm.AsyncEngineArgs``."""
    env: dict[str, str]
    """Environment of the replica's process."""
    eos_token_ids: tuple[int, ...]
    weight_transfer: str
    """``shared_memory``, ``nccl`` or ``ipc``."""
    tensor_parallel_size: int
    on_gpu: bool
    timeline: bool = False
    """Whether replicas tell when they were paused for new weights."""
    colocated: bool = False
    """Whether a learner shares the engine's GPU, and takes turns with it."""
    tool_parser: str | None = None
    """vLLM's name of a parser of tool calls; unset: none are read."""
    reasoning_parser: str | None = None
    tokenizer_path: str = ""
    """Folder or hub id of the tokenizer, which parsers need."""


class RolloutEngine:
    """Draws completions with log-probabilities and policy versions; loads published weights between tokens."""

    def __init__(self, spec: EngineSpec) -> None:
        import torch

        name = spec.engine_args.get("quantization")
        if name is not None and not spec.on_gpu and not torch.cpu._is_amx_tile_supported():
            # vLLM finds no kernel, in a process of its own and in an error of many lines.
            raise ConfigError("rollouts.quantization", name, "needs a GPU, or a CPU with AMX; leave it out")
        from vllm import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        self._spec = spec
        self._parser = MessageParser.of(spec)
        self._engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(**spec.engine_args),
            # Tokens per step by the GPU's memory, for throughput: 8,192 or 16,384. Without a context vLLM takes 2,048,
            # and prefill is split over many small steps.
            usage_context=UsageContext.LLM_CLASS,
        )
        self._shared = SharedBuckets()
        self._requests = 0
        self._updates = 0
        self._paused_at = 0.0
        self._sleeps = False
        self.version = -1
        """Policy version that the engine samples from."""
        self.pause_s = 0.0
        """How long the last update held generation up, in seconds."""

    async def start(self, version: int) -> None:
        """Prepare weight transfer and label the weights read from the model folder with ``version``."""
        if self._spec.weight_transfer == "shared_memory":
            await self.init_weight_transfer({})
        await self._engine.update_weight_version(str(version))
        self.version = version

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        """Hand the transfer backend what it needs to reach the learners."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))

    async def generate(
        self, prompt: Prompt, sampling: SamplingSettings, *, seed: int, max_tokens: int | None = None
    ) -> tuple[Trajectory, ...]:
        """Draw ``sampling.group_size`` completions of one prompt; the i-th one's seed is ``seed + i``.

        Args:
            prompt: All tokens so far.
            sampling: How tokens are drawn.
            seed: Of the first.
            max_tokens: Longest completion; unset: ``sampling.max_new_tokens``.

        Raises:
            RolloutError: The engine does not take such a prompt or such sampling settings.
        """
        from vllm.exceptions import VLLMClientError

        self._requests += 1
        asked_version = self.version
        request = self._engine.generate(
            # A prefix is shared among requests that came under the same weights only. To clear the cache would not do:
            # vLLM keeps it where sequences are in flight.
            {"prompt_token_ids": prompt.token_ids.tolist(), "cache_salt": str(self._updates)},
            self._sampling_params(sampling, seed, max_tokens or sampling.max_new_tokens),
            request_id=f"{prompt.prompt_id}-{self._requests}",
        )
        output = None
        try:
            async for answer in request:
                output = answer
        except VLLMClientError as error:  # What the engine would say again, and any other one.
            raise RolloutError(f"the engine refuses prompt {prompt.prompt_id}: {shortened(error)}") from error
        if output is None or not output.finished:
            raise RuntimeError(f"the engine ended prompt {prompt.prompt_id} without an output")
        parse = (
            functools.partial(self._parser.message, tools=sampling.tools) if self._parser and sampling.parse else None
        )
        choices = sorted(output.outputs, key=lambda choice: choice.index)
        return tuple(_completion(choice, asked_version, parse) for choice in choices)

    async def load_weights(self, manifest: WeightManifest, buckets: Sequence[Sequence[ByteArray]]) -> None:
        """Load one published version through shared memory; sequences in flight continue under the new weights."""
        updates = await asyncio.to_thread(self._shared.write, manifest.buckets, buckets)
        await self.begin_update()
        for update in updates:
            await self.apply_update(update)
        await self.finish_update(manifest.version)
        self._shared.release()

    async def begin_update(self) -> None:
        """Pause between two tokens and prepare for new weights.

        When anything fails from here on the engine stays paused: half-loaded weights must never sample a token.
        """
        if not self._sleeps:
            # Not pause_generation(): it does this and then sleeps 20 ms, only for its callers' convenience.
            await self._engine.engine_core.pause_scheduler_async(mode="keep", clear_cache=False)
        # Only now: until then the step that was under way continued, and wrote its tokens.
        self._paused_at = time.perf_counter()
        # Requests that come from here on are served by the new weights.
        self._updates += 1
        await self._engine.start_weight_update()

    async def apply_update(self, update: dict[str, Any]) -> None:
        """Load what the transfer backend describes or receives."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._engine.update_weights(WeightTransferUpdateRequest(update_info=update))

    async def finish_update(self, version: int) -> None:
        """Resume under the new weights, labeled ``version``; an engine without its cache does so in :meth:`wake`."""
        await self._engine.finish_weight_update(weight_version=str(version))
        if not self._sleeps:
            await self._engine.resume_generation()
        self.version = version
        self.pause_s = time.perf_counter() - self._paused_at

    async def sleep(self) -> None:
        """Leave the GPU to a learner: weights go to host memory, the cache is dropped.

        Requests in flight are kept, and recomputed from their tokens afterward. Not level 2: it drops buffers that
        no publication brings back (vLLM issue 29341).
        """
        self._sleeps = True
        await self._engine.sleep(level=1, mode="keep")

    async def wake_weights(self) -> None:
        """Bring the weights back, without a cache: new ones can be loaded where there is least in the way."""
        await self._engine.wake_up(tags=["weights"])

    async def wake(self) -> None:
        """Bring the cache back and resume."""
        await self._engine.wake_up(tags=["kv_cache"])
        self._sleeps = False

    @property
    def is_dead(self) -> bool:
        """Whether the engine's process is gone."""
        return bool(self._engine.errored)

    def shutdown(self) -> None:
        """End the engine's process."""
        self._engine.shutdown()

    def _sampling_params(self, sampling: SamplingSettings, seed: int, max_tokens: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        greedy = sampling.temperature == 0.0
        return SamplingParams(
            n=sampling.group_size,
            max_tokens=max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=None if greedy else seed,
            stop=list(sampling.stop) or None,
            stop_token_ids=[*self._spec.eos_token_ids, *sampling.stop_token_ids],
            # The engine stops at the ids above; its own EOS handling needs the tokenizer, which it does not load.
            ignore_eos=True,
            logprobs=0,
            flat_logprobs=True,
            detokenize=bool(sampling.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )


def _completion(choice: Any, asked_version: int, parse: Callable[[list[int]], ChatMessage] | None = None) -> Trajectory:
    token_ids = np.asarray(choice.token_ids, dtype=np.int32)
    logprobs = np.asarray(choice.logprobs.logprobs, dtype=np.float32)
    if len(logprobs) != len(token_ids):
        raise RuntimeError(f"the engine gave {len(logprobs)} log-probabilities for {len(token_ids)} tokens")
    spans = tuple(
        VersionSpan(version=int(span.version), start=span.start, end=span.end) for span in choice.weight_versions
    )
    message = None if parse is None else parse(token_ids.tolist())
    return Trajectory(
        token_ids=token_ids,
        turns=(Turn(start=0, end=len(token_ids), message=message),),
        sampling_logprobs=logprobs,
        version_spans=spans,
        asked_version=asked_version,
        finish_reason=choice.finish_reason,
    )
