"""Runs of a learner on a tiny model, for comparison: in the test's own process or, as a script, on several ranks.

``python learner_scenarios.py FOLDER RANK WORLD_SIZE`` runs every scenario of ``SCENARIOS`` in small microbatches and
leaves a ``RankResult`` in ``FOLDER/rank<RANK>.pt``.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import rlhf_ray
from rlhf_ray.config.plugins import advantage_plugin, loss_plugin
from rlhf_ray.config.settings import LearnerSettings, ModelSettings, RolloutSettings, TrainingSettings
from rlhf_ray.errors import LearnerError
from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.learner.initial_weights import local_part
from rlhf_ray.learner.learner import Learner, LearnerSpec
from rlhf_ray.learner.lora import LoraSpec
from rlhf_ray.learner.packing import RankPlan, UpdatePlan, plan_update
from rlhf_ray.learner.remote.commands import UpdateResult
from rlhf_ray.learner.trained_model import TrainedModel
from rlhf_ray.types import Device, ScoredGroup
from rlhf_ray.weight_sync import buckets as weight_buckets
from rlhf_ray.weight_sync.buckets import ByteArray, full_tensor
from rlhf_ray.weight_sync.manifest import BucketLayout

VOCABULARY = 64
MAX_NEW_TOKENS = 12
NEWEST, MAX_STALENESS = 7, 3
"""Version of the policy that is trained on rollouts of several turns, and the bound of their staleness."""
AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm")
WALL_TIMES = ("advantage_s", "update_s")

Figures = dict[str, float]
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One run: how the learner is set and what it is given."""

    training: dict[str, Any] = field(default_factory=dict)
    spec: dict[str, Any] = field(default_factory=dict)
    critic: str = "critic"
    reference: str | None = None
    """A model of its own; unset: the policy as it starts, where there is one."""
    num_sequences: int = 9
    num_minibatches: int = 2
    num_epochs: int = 1
    max_tokens: int = 1000
    small_max_tokens: int = 16
    """Of the same run in small microbatches."""
    update_policy: tuple[bool, ...] = (True, True)
    """One update an entry."""
    masked: bool = False
    """Whether truncated completions are left out of the losses."""
    stale: bool = False
    """Whether earlier policies sampled some of the tokens."""
    spoiled: int | None = None
    """A sequence with a number that is not finite, which changes nothing else: the reward of its greedy completion."""
    packed: bool = False
    """Whether microbatches are packed rows, which attention by cumulative lengths reads."""
    groups: Callable[[int], Sequence[ScoredGroup]] | None = None
    """Seed -> rollouts of several turns, which an update is made from; unset: random completions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankResult:
    """What one of several ranks leaves behind."""

    outcomes: dict[str, Outcome]
    """Scenario -> outcome, in small microbatches."""
    in_large_microbatches: Outcome
    """Of ``token_mean``."""
    buckets: list[tuple[BucketLayout, list[ByteArray] | None]]
    """What this rank was given of the weights before any update."""
    refusal: str
    """What this rank said of ``REFUSED``."""
    wires: dict[str, Wire]
    """What of the models in ``PUBLISHED`` was gathered for publications in bfloat16, and given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run did, the same on every rank."""

    figures: list[Figures]
    policy: Weights
    critic: Weights
    last: UpdateResult
    """The last update, with the advantages of this rank's sequences."""
    sequences: tuple[int, ...]
    """Which sequences of the last batch those are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """Two publications of one policy, through buckets and as vLLM's trainer engines read them."""

    gathered_bytes: list[dict[torch.dtype, int]]
    """Of each: what collectives brought together, by its type."""
    size_bytes: int
    """Of what is sent."""
    adapter_bytes: int
    """Of the matrices of adapters that a merge has to gather, in float32."""
    staged_bytes: int
    """What this rank took to host memory to send it later."""
    buckets: Weights
    source: Weights
    staged: Weights
    wanted: Weights
    """Gathered in float32 and rounded then."""


SCENARIOS: dict[str, Scenario] = {
    **{mode: Scenario(training={"loss_aggregation": mode}) for mode in AGGREGATIONS},
    "kl_in_reward": Scenario(training={"kl_coef": 0.3, "kl_estimator": "k3"}, num_epochs=2),
    "kl_in_loss": Scenario(
        training={"kl_coef": 0.3, "kl_in": "loss", "entropy_coef": 0.1, "dual_clip": 3.0, "max_grad_norm": 0.05}
    ),
    "one_step": Scenario(num_minibatches=1),
    **{
        method: Scenario(training={"advantage": method, "whiten_advantages": False})
        for method in ("grpo", "dr_grpo", "rloo", "opo", "reinforce_plus_plus", "remax")
    },
    **{
        loss: Scenario(training={"advantage": "grpo", "loss": loss, "clip_low": 0.02, "clip_high": 0.03})
        for loss in ("gspo", "cispo", "gmpo")
    },
    "sapo": Scenario(
        training={
            "advantage": "grpo",
            "loss": "sapo",
            "loss_args": {"temperature_positive": 1.0, "temperature_negative": 1.05},
        }
    ),
    "rloo_kl_in_reward": Scenario(training={"advantage": "rloo", "kl_coef": 0.3, "whiten_advantages": False}),
    "adapted_kl": Scenario(training={"kl_coef": 0.3, "kl_target": 0.01, "kl_horizon": 20, "kl_estimator": "k3"}),
    "masked": Scenario(training={"advantage": "grpo"}, masked=True, num_sequences=12),
    "critic_from_the_mean": Scenario(
        training={"value_init": "reward_mean", "value_huber": 0.5}, critic="policy", num_epochs=2
    ),
    "critic_warmup": Scenario(update_policy=(False, True)),
    "lora": Scenario(
        training={"kl_coef": 0.3, "kl_estimator": "k3"},
        spec={"lora": LoraSpec(rank=4, alpha=8.0, targets=(), seed=5)},
        num_epochs=2,
    ),
    "stale": Scenario(
        training={"behavior_cap": 1.5, "behavior_floor": 0.5}, spec={"max_staleness": 3}, stale=True, num_epochs=2
    ),
    "stale_sequences": Scenario(
        training={"advantage": "grpo", "behavior_weights": "sequence", "behavior_mode": "mask", "behavior_cap": 1e3},
        spec={"max_staleness": 3},
        stale=True,
    ),
    "stale_m2po": Scenario(
        training={"advantage": "grpo", "m2po_threshold": 4.0}, spec={"max_staleness": 3}, stale=True, num_epochs=2
    ),
    "stale_loglinear": Scenario(training={"proximal": "loglinear"}, spec={"max_staleness": 3}, stale=True),
    # Nothing is stale, and engines sample from what they have rounded the weights to.
    "quantized": Scenario(training={"behavior_cap": 1.5}, spec={"quantization": "fp8"}, num_epochs=2),
    "packed": Scenario(training={"kl_coef": 0.3, "kl_estimator": "k3"}, num_epochs=2, packed=True),
    "packed_with_an_idle_rank": Scenario(num_sequences=3, num_minibatches=1, small_max_tokens=1, packed=True),
    "skipped": Scenario(training={"nonfinite_updates": "skip"}, spoiled=3),
    "critic_of_its_own": Scenario(
        training={"critic_epochs": 3, "critic_num_minibatches": 1, "critic_lambda": 1.0, "lambda_": 0.5}, num_epochs=2
    ),
    "teacher": Scenario(training={"kl_coef": 0.3}, reference="transposed", num_epochs=2),
    "distribution": Scenario(
        training={"value_bins": 11, "value_range": (-3.0, 3.0), "value_clip": None}, critic="policy", num_epochs=2
    ),
    "imitated": Scenario(training={"nll_coef": 0.5}),
    "small_critic": Scenario(critic="small_critic"),
    # Of a family without a class for token classification.
    "made_critic": Scenario(critic="made_critic", num_epochs=2),
    # Two sequences in two minibatches: the second of two ranks holds no sequence at all.
    "idle_rank": Scenario(num_sequences=2),
    # Three sequences in one minibatch, each in a microbatch of its own: one rank's second microbatch is empty.
    "empty_microbatch": Scenario(num_sequences=3, num_minibatches=1, small_max_tokens=1),
}


def in_small_microbatches(scenario: Scenario) -> Scenario:
    """The same run cut so small that few sequences share a microbatch."""
    return replace(scenario, max_tokens=scenario.small_max_tokens)


def save_models(folder: Path) -> None:
    """Write ``policy`` (tied embeddings, dropout) and ``critic`` (a head of its own) as Hugging Face folders."""
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        Olmo2Config,
        Olmo2ForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen2ForTokenClassification,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        # Large enough that the distributions are far from uniform.
        initializer_range=0.2,
        attention_dropout=0.5,
        eos_token_id=1,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "policy")
    critic = Qwen2ForTokenClassification(Qwen2Config(**config.to_dict() | {"num_labels": 1}))
    critic.save_pretrained(folder / "critic")
    smaller = {"num_labels": 1, "num_hidden_layers": 1, "intermediate_size": 8}
    Qwen2ForTokenClassification(Qwen2Config(**config.to_dict() | smaller | {"layer_types": None})).save_pretrained(
        folder / "small_critic"
    )
    of_another_family = Olmo2Config(**config.to_dict() | {"layer_types": None, "architectures": None})
    Olmo2ForCausalLM(of_another_family).save_pretrained(folder / "made_critic")
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "layer_types": None}
    # Without its own model type its experts would be stored as memory has them.
    sizes |= {"architectures": None, "tie_word_embeddings": False, "model_type": "qwen3_moe"}
    experts = Qwen3MoeConfig(**config.to_dict() | sizes)
    Qwen3MoeForCausalLM(experts).save_pretrained(folder / "experts")
    transposed = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, eos_token_id=1)
    GPT2LMHeadModel(transposed).save_pretrained(folder / "transposed")


def make_spec(folder: Path, scenario: Scenario) -> LearnerSpec:
    # An epsilon that is large beside rounding: without it Adam would blow differences of 1e-9 up to a whole step.
    training: dict[str, Any] = {"adam_eps": 1e-3, "lr": 3e-3, "critic_lr": 5e-3, "weight_decay": 0.1}
    training |= {"gamma": 0.98, "lambda_": 0.9, "lr_schedule": "linear", "lr_warmup_steps": 2}
    training |= {"num_epochs": scenario.num_epochs, "num_minibatches": scenario.num_minibatches}
    settings = TrainingSettings(**training | scenario.training)
    advantage = advantage_plugin(settings.advantage, settings.advantage_args)
    arguments: dict[str, Any] = {
        "training": settings,
        "advantage": advantage,
        "loss": loss_plugin(settings.loss, settings.loss_args),
        "policy_path": str(folder / "policy"),
        "critic_path": str(folder / scenario.critic) if advantage.needs_critic else None,
        "reference_path": None if scenario.reference is None else str(folder / scenario.reference),
        "lora": None,
        "model": ModelSettings(attn_implementation="varlen" if scenario.packed else "auto"),
        "rollouts": RolloutSettings(temperature=0.8, max_new_tokens=MAX_NEW_TOKENS),
        "learners": LearnerSettings(gradient_checkpointing=False, num_threads=1),
        "compute": Device(on_gpu=False, learners_on_gpu=False, colocated=False, dtype="float32"),
        "critic_steps": 12,
        "policy_steps": 12,
        "timeline": False,
        "keeps_state": False,
    }
    return changed(LearnerSpec(**arguments), scenario.spec)


def changed(spec: LearnerSpec, changes: dict[str, Any]) -> LearnerSpec:
    """Replace fields of a spec, or of its first section that has them."""
    for name, value in changes.items():
        if name not in {one.name for one in fields(spec)}:
            sections = ("compute", "learners", "model", "rollouts")
            section = next(one for one in sections if hasattr(getattr(spec, one), name))
            name, value = section, replace(getattr(spec, section), **{name: value})
        spec = replace(spec, **{name: value})
    return spec


def make_batch(num_sequences: int, seed: int, *, masked: bool = False, stale: bool = False) -> SequenceBatch:
    """Random sequences with completions of 1 to ``MAX_NEW_TOKENS`` tokens, read-only as from the object store."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(2, 9, size=num_sequences).astype(np.int32)
    completions = rng.integers(2, MAX_NEW_TOKENS + 1, size=num_sequences).astype(np.int32)
    completions[0] = 1
    batch = SequenceBatch.single_turn(
        token_ids=rng.integers(2, VOCABULARY, size=int((prompts + completions).sum())).astype(np.int32),
        prompt_lengths=prompts,
        completion_lengths=completions,
        sampling_logprobs=-rng.exponential(2.0, size=int(completions.sum())).astype(np.float32),
        rewards=rng.normal(size=num_sequences).astype(np.float32),
        truncated=rng.random(num_sequences) < 0.4,
        # Groups of three, scattered over the batch.
        group_ids=rng.permutation(num_sequences) // 3,
        greedy_rewards=rng.normal(size=num_sequences).astype(np.float32),
    )
    batch = replace(batch, successful=batch.rewards > 0)
    if stale:
        # A third of the sequences is on-policy; of the others the first tokens are the stalest.
        newest = np.repeat(rng.integers(0, 3, size=num_sequences), completions)
        positions = np.concatenate([np.arange(length) for length in completions])
        staleness = (newest * (1 + (positions < 3))).astype(np.int32)
        on_policy = np.asarray([not part.any() for part in np.split(staleness, np.cumsum(completions)[:-1])])
        batch = replace(batch, staleness=staleness, on_policy=on_policy)
    if masked:
        batch = replace(batch, loss_mask=~np.repeat(batch.truncated, completions))
    for array in fields(batch):
        getattr(batch, array.name).setflags(write=False)
    return batch


def share_of(batch: SequenceBatch, scenario: Scenario, seed: int = 0) -> tuple[SequenceBatch, RankPlan]:
    """What this rank is given of a batch."""
    plan = plan_of(batch, scenario, seed)
    share = share_number(scenario)
    return batch.select(plan.sequences[share]), plan.ranks[share]


def share_number(scenario: Scenario) -> int:
    """Which share of a batch this rank has: that of its neighbors, where they read slices of it."""
    return dist.get_rank() // scenario.spec.get("sequence_parallel", 1)


def plan_of(batch: SequenceBatch, scenario: Scenario, seed: int) -> UpdatePlan:
    """Which rank trains on what of a batch."""
    return plan_update(
        batch.lengths.tolist(),
        batch.loss_lengths.tolist(),
        num_minibatches=scenario.num_minibatches,
        num_epochs=max(scenario.num_epochs, scenario.training.get("critic_epochs", 0)),
        num_ranks=dist.get_world_size() // scenario.spec.get("sequence_parallel", 1),
        max_tokens=scenario.max_tokens,
        attention_length=1536.0,
        packed=scenario.packed,
        seed=seed,
        of_trajectory=batch.of_trajectory.tolist(),
        successful=batch.successful.tolist(),
    )


def batch_of(scenario: Scenario, number: int) -> SequenceBatch:
    """All sequences of the run's update ``number``, from 0."""
    if scenario.groups is not None:
        return SequenceBatch.from_groups(scenario.groups(100 + number), version=NEWEST, max_staleness=MAX_STALENESS)
    batch = make_batch(scenario.num_sequences, seed=100 + number, masked=scenario.masked, stale=scenario.stale)
    if scenario.spoiled is not None:
        indices = np.arange(scenario.num_sequences)
        batch = replace(batch, greedy_rewards=np.where(indices == scenario.spoiled, np.nan, batch.greedy_rewards))
    return batch


def update(learner: Learner, scenario: Scenario, number: int, *, keep_estimates: bool = False) -> Figures:
    """The run's update ``number``, from 0."""
    batch, plan = share_of(batch_of(scenario, number), scenario, seed=number)
    return learner.update(batch, plan, update_policy=scenario.update_policy[number], keep_estimates=keep_estimates)


def build(folder: Path, scenario: Scenario) -> Learner:
    """A learner that packs rows where the scenario does."""
    learner = Learner(make_spec(folder, scenario))
    assert learner.packed == scenario.packed
    return learner


def run(scenario: Scenario, folder: Path) -> Outcome:
    """Build a learner and make all its updates."""
    learner = build(folder, scenario)
    count = len(scenario.update_policy)
    figures = [update(learner, scenario, number, keep_estimates=number == count - 1) for number in range(count)]
    return outcome_of(learner, scenario, figures)


def run_in_turns(scenario: Scenario, folder: Path) -> Outcome:
    """As :func:`run`, with all in host memory before, between and after the updates."""
    learner = build(folder, scenario)
    figures = []
    for number in range(len(scenario.update_policy)):
        take_turns(learner)
        figures.append(update(learner, scenario, number, keep_estimates=True))
    take_turns(learner)
    return outcome_of(learner, scenario, figures)


def take_turns(learner: Learner) -> None:
    """Take all to host memory and back: nothing stays on the device meanwhile, and every tensor is the one it was."""
    assert learner.state()
    assert list(learner.weight_buckets())
    tensors, sizes = device_tensors(learner), device_bytes(learner)
    weights = gathered(learner.policy.checkpoint.tensors())
    learner.stage_weights()
    assert max(sizes) > 0  # A rank may have nothing of a small tensor.
    learner.offload()
    learner.offload()
    assert learner.is_offloaded
    assert set(device_bytes(learner)) == {0}
    assert learner._staged is not None
    for _ in range(2):
        # What is sent then is as it was, on every rank.
        staged = gathered(learner._staged())
        assert list(staged) == list(weights)
        assert all(torch.equal(staged[name], weights[name]) for name in weights)
    learner.onload()
    learner.onload()
    assert device_bytes(learner) == sizes
    assert [id(tensor) for tensor in device_tensors(learner)] == [id(tensor) for tensor in tensors]


def gathered(parameters: Iterable[tuple[str, torch.Tensor]]) -> Weights:
    return {name: full_tensor(tensor.detach()).clone() for name, tensor in parameters}


def device_tensors(learner: Learner) -> list[torch.Tensor]:
    """Weights of all models and the state of the optimizers."""
    models = [learner.policy, *([] if learner.critic is None else [learner.critic])]
    reference = [] if learner._models.reference is None else list(learner._models.reference.model.parameters())
    return [*(tensor for model in models for tensor in model.tensors()), *reference]


def device_bytes(learner: Learner) -> list[int]:
    """Of the memory behind each of them, and behind what FSDP gathers from."""
    of_fsdp = [
        parameter._sharded_param_data
        for model in (learner.policy, learner.critic, learner._models.reference)
        if model is not None
        for module in model.model.modules()
        if isinstance(module, FSDPModule)
        for parameter in module._get_fsdp_state()._fsdp_param_group.fsdp_params
    ]
    return [storage_bytes(tensor) for tensor in (*device_tensors(learner), *of_fsdp)]


def storage_bytes(tensor: torch.Tensor) -> int:
    """Of the memory behind this rank's part of a tensor."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage().nbytes()


def outcome_of(learner: Learner, scenario: Scenario, figures: list[Figures]) -> Outcome:
    """What a learner has come to with the run's last update."""
    number = len(scenario.update_policy) - 1
    return Outcome(
        figures=figures,
        policy=full_weights(learner.policy),
        critic={} if learner.critic is None else full_weights(learner.critic),
        last=UpdateResult(metrics=figures[-1], estimates=learner.token_estimates),
        sequences=plan_of(batch_of(scenario, number), scenario, number).sequences[share_number(scenario)],
    )


def full_weights(trained: TrainedModel) -> Weights:
    """The gathered weights; a collective."""
    return {name: parameter.detach().full_tensor().clone() for name, parameter in trained.checkpoint.tensors()}


# Three updates, of which the first is made on one set of ranks and the others, after a restart, on another.
RESUMED = Scenario(num_epochs=2, update_policy=(True, True, True))


# Not among the others: products in bfloat16 depend on what else is in the microbatch.
IN_BFLOAT16 = Scenario(training={"kl_coef": 0.3}, spec={"dtype": "bfloat16"})

# Policy (tied weights), critic and reference; adapters; no critic.
IN_TURNS = ("kl_in_reward", "lora", "grpo")

# One sequence, which one rank has, spoils the batch of both.
REFUSED = Scenario(spoiled=3)


def refusal(folder: Path) -> str:
    """What the learner says of ``REFUSED``, whose state it must leave as it was."""
    learner = Learner(make_spec(folder, REFUSED))
    update(learner, Scenario(), 0)
    before = copy.deepcopy(learner.state())
    try:
        update(learner, REFUSED, 1)
    except LearnerError as error:
        assert same_state(before, learner.state())
        assert all(isinstance(one, DTensor) for model in learner._models.all() for one in model.parameters())
        return str(error)
    return "no refusal"


_LORA = LoraSpec(rank=4, alpha=8.0, targets=(), seed=5)
# Tied weights, experts that checkpoints hold one by one, and adapters on weights of either way round.
PUBLISHED: dict[str, dict[str, Any]] = {
    "policy": {},
    "experts": {},
    "policy, adapted": {"lora": _LORA},
    "transposed, adapted": {"lora": _LORA},
}


class Gathers(TorchDispatchMode):  # type: ignore[misc]
    """Counts the bytes that collectives bring together of sharded tensors, by type."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(one, DTensor) for one in types):
            return NotImplemented
        if func is torch.ops._c10d_functional.all_gather_into_tensor.default:
            whole = args[0].nbytes * dist.get_world_size()
            self.bytes[args[0].dtype] = self.bytes.get(args[0].dtype, 0) + whole
        return func(*args, **(kwargs or {}))


def publish_in(dtype: str, learner: Learner) -> None:
    """Have a learner that computes in float32 publish in another type."""
    learner._spec = changed(learner._spec, {"dtype": dtype})


def wire_of(folder: Path, name: str) -> Wire:
    """Publish a policy after an update, in bfloat16."""
    spec = {"policy_path": str(folder / name.split(",")[0])} | PUBLISHED[name]
    learner = Learner(make_spec(folder, Scenario(spec=spec)))
    update(learner, Scenario(), 0)
    publish_in("bfloat16", learner)
    buckets: Weights = {}
    with Gathers() as first:
        for layout, pieces in learner.weight_buckets():
            for tensor, piece in zip(layout.tensors, pieces or (), strict=pieces is not None):
                buckets[tensor.name] = torch.from_numpy(piece).view(getattr(torch, tensor.dtype)).view(tensor.shape)
    with Gathers() as second:
        source = learner.weight_source()
        given = dict(source)
    # Where weights are transposed the other matrix has to be sharded anew, which gloo does by a gather.
    matrix = ".lora_" if name.startswith("transposed") else ".lora_A."
    adapters = [p.numel() for key, p in learner.policy.model.named_parameters() if matrix in key]
    staged_bytes: list[int] = []
    with pytest.MonkeyPatch.context() as patched:
        on_host = weight_buckets._on_host

        def counted(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            copy = on_host(tensor, dtype)
            staged_bytes.append(copy.nbytes)
            return copy

        patched.setattr(weight_buckets, "_on_host", counted)
        learner.stage_weights()
    assert learner._staged is not None
    return Wire(
        staged_bytes=sum(staged_bytes),
        staged=gathered(learner._staged()),
        gathered_bytes=[first.bytes, second.bytes],
        size_bytes=source.size_bytes(),
        adapter_bytes=4 * sum(adapters),
        buckets=buckets,
        source=given,
        wanted={key: full_tensor(p.detach()).bfloat16() for key, p in learner.policy.checkpoint.tensors()},
    )


def same_state(first: Any, second: Any) -> bool:
    """Whether two of :meth:`Learner.state` are equal bit for bit."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same_state(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same_state, first, second))
    return local_part(first).numpy().tobytes() == local_part(second).numpy().tobytes()


def save_after_one_update(folder: Path, checkpoint: Path) -> None:
    """The first part of ``RESUMED``."""
    learner = Learner(make_spec(folder, RESUMED))
    update(learner, RESUMED, 0)
    learner.save(str(checkpoint)).result()
    dist.barrier()


def main(folder: Path, rank: int, world_size: int) -> None:
    """One rank's part of everything that is made on several."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    outcomes = {name: run(in_small_microbatches(scenario), folder) for name, scenario in SCENARIOS.items()}
    outcomes["in_bfloat16"] = run(IN_BFLOAT16, folder)
    outcomes |= {f"{name}_in_turns": run_in_turns(in_small_microbatches(SCENARIOS[name]), folder) for name in IN_TURNS}
    large = run(SCENARIOS["token_mean"], folder)
    save_after_one_update(folder, folder / "checkpoint")
    learner = Learner(make_spec(folder, Scenario()))
    buckets = list(learner.weight_buckets())
    learner.export(str(folder / "export"))
    result = RankResult(
        outcomes=outcomes,
        in_large_microbatches=large,
        buckets=buckets,
        refusal=refusal(folder),
        wires={name: wire_of(folder, name) for name in PUBLISHED},
    )
    torch.save(result, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def run_ranks(script: str, folder: Path, world_size: int, *arguments: int) -> None:
    """Run a script as ``script FOLDER RANK WORLD_SIZE ARGUMENTS``, a process for each rank, and wait for all."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(rlhf_ray.__file__).parents[1])}
    started = [
        subprocess.Popen(
            [sys.executable, script, str(folder), *map(str, (rank, world_size, *arguments))],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        for process in started:
            output, _ = process.communicate(timeout=400)
            assert process.returncode == 0, output
    finally:
        for process in started:
            process.kill()


def without_wall_times(figures: Sequence[Figures]) -> list[Figures]:
    return [{name: value for name, value in one.items() if name not in WALL_TIMES} for one in figures]


if __name__ == "__main__":
    # Under its own name, or the results would be pickled as classes of ``__main__``.
    import learner_scenarios

    learner_scenarios.main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
