"""PPO iterations of many families: a real engine and a real learner in one process, without Ray.

``python family_iterations.py FOLDER FAMILY ...``, in ``ENVIRONMENT``, imports everything once and forks a process for
each family, since vLLM leaves behind in its process what the next engine stumbles over. Each leaves
``FOLDER/<family>.json``: what became of the family.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import learner_scenarios as runs
import numpy as np
import torch
import torch.distributed as dist
from model_families import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlhf_ray.config.settings import DataSettings, RolloutSettings, Settings
from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.learner.learner import Learner
from rlhf_ray.quickstart import model_path
from rlhf_ray.rollouts.engine import RolloutEngine
from rlhf_ray.rollouts.engine_spec import engine_spec
from rlhf_ray.types import Device, Prompt, RolloutGroup, SamplingSettings, ScoredGroup
from rlhf_ray.weight_sync.manifest import WeightManifest

ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
GROUP = 4
PROMPTS = ([17, 11, 18], [40, 41, 42, 43, 44])
# Two updates: what the second one's completions were drawn from was published after the first.
VERSIONS = (0, 1)
LIMIT_S = 90


class InProcess:
    """What ``RolloutEngine`` uses of ``AsyncLLM``, on an engine in this process."""

    errored = False

    def __init__(self, arguments: Any) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.v1.engine.llm_engine import LLMEngine

        self._engine = LLMEngine.from_engine_args(arguments)
        self.engine_core = self
        # Kept, as it ends with the last reference.
        self._context = set_current_vllm_config(self._engine.vllm_config)
        self._context.__enter__()

    async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[Any]:
        self._engine.add_request(request_id, prompt, params)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                if output.finished:
                    yield output

    async def pause_scheduler_async(self, **_: Any) -> None: ...

    async def resume_generation(self) -> None: ...

    async def update_weight_version(self, version: str) -> None:
        self._engine.set_weight_version(version)

    async def init_weight_transfer_engine(self, request: Any) -> None:
        self._engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": request.init_info})

    async def start_weight_update(self) -> None:
        self._engine.collective_rpc("start_weight_update")

    async def update_weights(self, request: Any) -> None:
        self._engine.collective_rpc("update_weights", kwargs={"update_info": request.update_info})

    async def finish_weight_update(self, weight_version: str) -> None:
        self._engine.collective_rpc("finish_weight_update")
        self._engine.set_weight_version(weight_version)


async def sampled(engine: RolloutEngine, version: int) -> SequenceBatch:
    """Groups whose rewards are what their tokens are on average."""
    sampling = SamplingSettings(group_size=GROUP, max_new_tokens=8, temperature=0.8)
    groups = []
    for number, ids in enumerate(PROMPTS):
        prompt = Prompt(prompt_id=number, token_ids=np.asarray(ids, dtype=np.int32), text="", columns={})
        completions = await engine.generate(prompt, sampling, seed=100 * version + number)
        group = RolloutGroup(group_id=number, prompt=prompt, trajectories=completions, replica_id="")
        rewards = np.asarray([completion.token_ids.mean() / 100 for completion in completions], dtype=np.float32)
        texts = ("",) * GROUP
        groups.append(ScoredGroup(group=group, rewards=rewards, rewards_by_function={}, texts=texts, reward_s=0.0))
    return SequenceBatch.from_groups(groups, version=version, max_staleness=0)


async def iterate(folder: Path) -> dict[str, Any]:
    """Sample, update policy and critic, publish; twice."""
    path = str(folder / "policy")
    rollouts = RolloutSettings(max_new_tokens=8, group_size=GROUP, weight_transfer="shared_memory")
    spec = engine_spec(
        replace(Settings(), rollouts=rollouts, data=DataSettings(batch_size=len(PROMPTS))),
        Device(on_gpu=False, learners_on_gpu=False, colocated=False, dtype="float32"),
        model_path=path,
        tokenizer_path=path,
        config=AutoConfig.from_pretrained(path),
        eos_token_ids=(),
        prompt_tokens=8,
    )
    os.environ |= spec.env | {"VLLM_LOGGING_LEVEL": "ERROR"}
    engine = RolloutEngine(spec)
    scenario = runs.Scenario(critic="policy", num_minibatches=2)
    learner = Learner(runs.make_spec(folder, scenario))
    assert learner.critic is not None
    await engine.start(version=0)
    figures = []
    for version in VERSIONS:
        figures.append(learner.update(*runs.share_of(await sampled(engine, version), scenario)))
        layouts, pieces = zip(*learner.weight_buckets(), strict=True)
        manifest = WeightManifest(version=version + 1, publication=str(version), buckets=layouts)
        await engine.load_weights(manifest, pieces)
    return {
        name: [figure[name] for figure in figures]
        for name in ("sampling_logprob_diff_max", "grad_norm", "critic_grad_norm")
    }


def outcome(family: str, folder: Path) -> dict[str, Any]:
    from vllm.v1.engine.async_llm import AsyncLLM

    AsyncLLM.from_engine_args = staticmethod(InProcess)
    signal.alarm(LIMIT_S)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(family)).save_pretrained(folder / "policy")
    AutoTokenizer.from_pretrained(model_path()).save_pretrained(folder / "policy")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    return asyncio.run(iterate(folder))


def main(results: Path, families: list[str]) -> None:
    import vllm.model_executor.models.registry as registry

    # The registry looks at each class in a process of its own, which imports vLLM again.
    registry._run_in_subprocess = lambda function: function()
    torch.set_num_threads(1)
    for family in families:
        child = os.fork()
        if child == 0:
            folder = results / family
            try:
                found = outcome(family, folder)
            except BaseException as error:
                found = {"error": f"{type(error).__name__}: {error}"}
            (results / f"{family}.json").write_text(json.dumps(found))
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            (results / f"{family}.json").write_text(json.dumps({"error": f"ended with status {status}"}))
        print(family, (results / f"{family}.json").read_text()[:300], flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
