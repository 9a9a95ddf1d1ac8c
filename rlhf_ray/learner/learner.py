"""One learner rank: estimates, advantages and optimiser steps over its share of a batch.

Consumes a :class:`SequenceBatch` and its :class:`RankPlan`; produces updated policy and critic, and the figures of the
update. Plain class on ``torch.distributed``, no Ray: the train loop (train_loop.py) constructs and drives it. All
ranks call the same methods in step.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh

from rlhf_ray.advantages import Moments, explained_variance, gae, kl, kl_penalised_rewards, whiten
from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.learner.layout import Microbatch, lay_out, pad_completions
from rlhf_ray.learner.metrics import MetricSums
from rlhf_ray.learner.models import attention_kernel, load_critic, load_policy, shard
from rlhf_ray.learner.packing import Minibatch, RankPlan
from rlhf_ray.learner.trained_model import TrainedModel
from rlhf_ray.losses import (
    entropy_bonus,
    global_normalizer,
    kl_loss,
    ppo_loss,
    token_entropy,
    token_logprobs,
    token_logprobs_and_entropy,
    value_loss,
)
from rlhf_ray.settings import TrainingSettings
from rlhf_ray.weight_sync.buckets import ByteArray, gather_buckets
from rlhf_ray.weight_sync.manifest import BucketLayout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlhf_ray.weight_sync.nccl import ShardedSource

__all__ = ["Learner", "LearnerSpec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSpec:
    """What a rank needs to build its models; made once on the driver."""

    training: TrainingSettings
    policy_path: str
    critic_path: str
    attn_implementation: str
    trust_remote_code: bool
    gradient_checkpointing: bool
    dtype: str
    """Compute type: ``float32`` or ``bfloat16``."""
    wire_dtype: str
    """Type of published weights: the engines' own."""
    temperature: float
    """Sampling temperature: log-probabilities are those of the distribution sampled from."""
    max_new_tokens: int
    total_steps: int
    """Optimiser steps of the run."""
    on_gpu: bool
    num_threads: int | None
    """CPU threads of a rank; none: its share of the machine's cores."""

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return torch.device("cuda", torch.cuda.current_device()) if self.on_gpu else torch.device("cpu")

    @property
    def packed(self) -> bool:
        """Whether rows are packed: only flash attention keeps packed sequences apart at no cost."""
        kernel = attention_kernel(self.attn_implementation, torch.device("cuda" if self.on_gpu else "cpu"))
        return kernel == "flash_attention_2"


@dataclass(slots=True, kw_only=True)
class _Estimates:
    """Per-token figures of a rank's batch, ``[N, T]`` each, computed before the first step."""

    mask: torch.Tensor
    sampling_logprobs: torch.Tensor
    values: torch.Tensor
    bootstrap: torch.Tensor
    """``[N]``, value after the last token; 0 where the completion finished."""
    proximal_logprobs: torch.Tensor | None = None
    """Under the policy before the update; ``None`` where the only step's own forward pass gives them."""
    ref_logprobs: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    returns: torch.Tensor | None = None


class Learner:
    """Policy, critic and reference of one rank, on an initialised process group."""

    def __init__(self, spec: LearnerSpec) -> None:
        self._spec = spec
        self._training = spec.training
        device = spec.device
        if device.type == "cpu":
            torch.set_num_threads(spec.num_threads or _share_of_cores())
        self._device = device
        self._world_size = dist.get_world_size()
        mesh = init_device_mesh(device.type, (self._world_size,))
        compute_dtype: torch.dtype = getattr(torch, spec.dtype)
        loading: dict[str, Any] = {
            "attn_implementation": attention_kernel(spec.attn_implementation, device),
            "trust_remote_code": spec.trust_remote_code,
        }

        def sharded(model: PreTrainedModel, *, trained: bool) -> PreTrainedModel:
            checkpointing = spec.gradient_checkpointing and trained
            return shard(model.to(device), mesh, compute_dtype=compute_dtype, gradient_checkpointing=checkpointing)

        training = self._training
        self.policy = TrainedModel(
            sharded(load_policy(spec.policy_path, **loading), trained=True),
            training,
            lr=training.lr,
            max_grad_norm=training.max_grad_norm,
            total_steps=spec.total_steps,
        )
        self.critic = TrainedModel(
            sharded(load_critic(spec.critic_path, **loading), trained=True),
            training,
            lr=training.critic_lr,
            max_grad_norm=training.critic_max_grad_norm,
            total_steps=spec.total_steps,
        )
        self._reference: PreTrainedModel | None = None
        if training.kl_coef > 0:
            self._reference = sharded(load_policy(spec.policy_path, **loading), trained=False)
            self._reference.requires_grad_(False)

    def update(self, batch: SequenceBatch, plan: RankPlan, *, update_policy: bool = True) -> dict[str, float]:
        """Train on one batch; returns the figures of the update, the same on every rank.

        Args:
            batch: This rank's sequences.
            plan: Minibatches, microbatches and epochs over them.
            update_policy: False in the critic's warm-up.
        """
        started = time.perf_counter()
        metrics = MetricSums()
        microbatches = {
            rows: lay_out(batch, rows, packed=self._spec.packed, device=self._device)
            for minibatch in plan.minibatches
            for rows in minibatch.microbatches
        }
        one_step = len(plan.minibatches) == 1 and len(plan.epochs) == 1
        estimates = self._estimate(batch, microbatches, plan, skip_proximal=one_step)
        figures = self._set_advantages(batch, estimates, metrics)
        estimated = time.perf_counter()
        first = True
        for epoch in plan.epochs:
            for index in epoch:
                self._step(plan.minibatches[index], microbatches, estimates, metrics, update_policy, first=first)
                first = False
        self._reshard()
        figures |= metrics.merge(len(plan.minibatches) * len(plan.epochs))
        figures["lr"], figures["critic_lr"] = self.policy.lr, self.critic.lr
        ended = time.perf_counter()
        return figures | {"advantage_s": estimated - started, "update_s": ended - estimated}

    def weight_buckets(self) -> Iterator[tuple[BucketLayout, ByteArray | None]]:
        """Gather the policy for publication; rank 0 keeps the bytes, every rank must iterate to the end."""
        dtype: torch.dtype = getattr(torch, self._spec.wire_dtype)
        return gather_buckets(self.policy.checkpoint_parameters(), dtype=dtype, keep=dist.get_rank() == 0)

    def weight_source(self) -> ShardedSource:
        """The policy as vLLM's NCCL trainer engine reads it."""
        from rlhf_ray.weight_sync.nccl import ShardedSource

        return ShardedSource(self.policy.checkpoint_parameters, getattr(torch, self._spec.wire_dtype))

    def save(self, folder: str) -> None:
        """Write a distributed checkpoint of policy, critic and optimisers."""
        dcp.save(self._state(), checkpoint_id=folder)

    def load(self, folder: str) -> None:
        """Restore what :meth:`save` wrote, on any number of ranks."""
        state = self._state()
        dcp.load(state, checkpoint_id=folder)
        self.policy.load_state_dict(state["policy"])
        self.critic.load_state_dict(state["critic"])

    def export(self, folder: str) -> None:
        """Write the policy and the critic as Hugging Face folders: ``folder`` and ``folder/critic``."""
        dtype = torch.float32
        for model, path in ((self.policy.model, Path(folder)), (self.critic.model, Path(folder) / "critic")):
            # A gather is a collective: every rank iterates, rank 0 writes.
            full = {name: p.detach().full_tensor().to("cpu", dtype) for name, p in model.named_parameters()}
            if dist.get_rank() == 0:
                _write_pretrained(model, full, path)
            dist.barrier()

    def _reshard(self) -> None:
        """A forward pass without a backward one leaves a model's outermost weights gathered on every rank."""
        for model in (self.policy.model, self._reference):
            if model is not None:
                model.reshard()

    def _state(self) -> dict[str, Any]:
        return {"policy": self.policy.state_dict(), "critic": self.critic.state_dict()}

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _estimate(
        self,
        batch: SequenceBatch,
        microbatches: dict[tuple[int, ...], Microbatch],
        plan: RankPlan,
        *,
        skip_proximal: bool,
    ) -> _Estimates:
        training = self._training
        kl_in_reward = training.kl_coef > 0 and training.kl_in == "reward"
        sampling = pad_completions(batch.sampling_logprobs, batch.completion_lengths, device=self._device)
        # Copies: arrays from the object store are read-only, which PyTorch's tensors cannot be.
        lengths = torch.tensor(batch.completion_lengths, device=self._device)
        mask = torch.arange(sampling.shape[1], device=self._device)[None, :] < lengths[:, None]
        estimates = _Estimates(
            mask=mask,
            sampling_logprobs=sampling,
            values=torch.zeros_like(sampling),
            bootstrap=torch.zeros(len(batch), device=self._device),
        )
        if kl_in_reward or not skip_proximal:
            estimates.proximal_logprobs = torch.zeros_like(sampling)
        if self._reference is not None:
            estimates.ref_logprobs = torch.zeros_like(sampling)
        for minibatch in plan.minibatches:
            for rows in minibatch.microbatches:
                micro = microbatches[rows]
                values = self._values(micro)
                _put(estimates.values, micro, values[micro.value_index])
                if len(micro.rows):
                    estimates.bootstrap[micro.rows] = values[micro.last_index]
                if estimates.proximal_logprobs is not None:
                    _put(estimates.proximal_logprobs, micro, self._logprobs(self.policy.model, micro))
                if self._reference is not None and estimates.ref_logprobs is not None:
                    _put(estimates.ref_logprobs, micro, self._logprobs(self._reference, micro))
        estimates.bootstrap *= torch.tensor(batch.truncated, device=self._device)
        return estimates

    def _set_advantages(self, batch: SequenceBatch, estimates: _Estimates, metrics: MetricSums) -> dict[str, float]:
        """Rewards and values -> advantages and returns, whitened over all ranks."""
        training, mask = self._training, estimates.mask
        penalty = None
        if estimates.ref_logprobs is not None and estimates.proximal_logprobs is not None:
            penalty = kl(estimates.proximal_logprobs, estimates.ref_logprobs, estimator=training.kl_estimator)
            metrics.add({"kl_to_reference": _mean(penalty, mask)}, float(mask.sum()))
        in_reward = training.kl_in == "reward"
        rewards = kl_penalised_rewards(
            torch.tensor(batch.rewards, device=self._device),
            mask,
            kl=penalty if in_reward else None,
            coef=training.kl_coef if in_reward else 0.0,
        )
        advantages, returns = gae(
            rewards,
            estimates.values,
            mask,
            gamma=training.gamma,
            lam=training.lambda_,
            bootstrap=estimates.bootstrap,
        )
        of_advantages, of_returns, of_residuals = self._merged_moments(
            mask, advantages, returns, returns - estimates.values
        )
        if training.whiten_advantages:
            advantages = whiten(advantages, mask, moments=of_advantages)
        estimates.advantages, estimates.returns = advantages, returns
        return {
            "explained_variance": explained_variance(of_returns, of_residuals),
            "advantage_mean": of_advantages.mean,
            "advantage_std": of_advantages.variance() ** 0.5,
        }

    def _merged_moments(self, mask: torch.Tensor, *tensors: torch.Tensor) -> list[Moments]:
        mine = torch.stack([Moments.of(tensor, mask).to_tensor() for tensor in tensors]).to(self._device)
        gathered = [torch.empty_like(mine) for _ in range(self._world_size)]
        dist.all_gather(gathered, mine)
        parts = torch.stack(gathered).cpu()
        return [sum(map(Moments.from_tensor, parts[:, i]), Moments()) for i in range(len(tensors))]

    def _step(
        self,
        minibatch: Minibatch,
        microbatches: dict[tuple[int, ...], Microbatch],
        estimates: _Estimates,
        metrics: MetricSums,
        update_policy: bool,
        *,
        first: bool,
    ) -> None:
        """One optimiser step of critic and policy over a minibatch."""
        normalizer = global_normalizer(
            minibatch.completion_lengths, self._training.loss_aggregation, max_length=self._spec.max_new_tokens
        )
        last = len(minibatch.microbatches) - 1
        for position, rows in enumerate(minibatch.microbatches):
            micro = microbatches[rows]
            for trained in (self.policy, self.critic):
                trained.sync_gradients(position == last)
            self._backward_critic(micro, estimates, normalizer, metrics)
            if update_policy:
                self._backward_policy(micro, estimates, normalizer, metrics, first=first)
        metrics.add({"critic_grad_norm": self.critic.step()}, 1.0)
        if update_policy:
            metrics.add({"grad_norm": self.policy.step()}, 1.0)

    def _backward_critic(
        self, micro: Microbatch, estimates: _Estimates, normalizer: float, metrics: MetricSums
    ) -> None:
        assert estimates.returns is not None
        values = self._values(micro)[micro.value_index]
        loss, means = value_loss(
            values,
            _take(estimates.values, micro),
            _take(estimates.returns, micro),
            micro.mask,
            clip=self._training.value_clip,
            aggregation=self._training.loss_aggregation,
            normalizer=normalizer,
        )
        # FSDP averages gradients over ranks; the global denominator wants their sum.
        (loss * self._world_size).backward()
        metrics.add_loss("value_loss", loss)
        metrics.add(means, float(micro.mask.sum()))

    def _backward_policy(
        self, micro: Microbatch, estimates: _Estimates, normalizer: float, metrics: MetricSums, *, first: bool
    ) -> None:
        assert estimates.advantages is not None
        training = self._training
        logits = self._logits(self.policy.model, micro)
        with_gradient = training.entropy_coef != 0.0
        if with_gradient:
            flat, flat_entropy = token_logprobs_and_entropy(logits, micro.targets, temperature=self._spec.temperature)
        else:
            flat = token_logprobs(logits, micro.targets, temperature=self._spec.temperature)
            with torch.no_grad():
                flat_entropy = token_entropy(logits, temperature=self._spec.temperature)
        assert flat_entropy is not None
        logprobs = flat.flatten()[micro.completion_index]
        entropies = flat_entropy.flatten()[micro.completion_index]
        proximal = (
            logprobs.detach() if estimates.proximal_logprobs is None else _take(estimates.proximal_logprobs, micro)
        )
        aggregated: dict[str, Any] = {"aggregation": training.loss_aggregation, "normalizer": normalizer}
        loss, means = ppo_loss(
            logprobs,
            proximal,
            _take(estimates.advantages, micro),
            micro.mask,
            clip_low=training.clip_low,
            clip_high=training.clip_high,
            dual_clip=training.dual_clip,
            **aggregated,
        )
        total = loss
        if with_gradient:
            bonus, _ = entropy_bonus(entropies, micro.mask, **aggregated)
            total = total - training.entropy_coef * bonus
        if training.kl_coef > 0 and training.kl_in == "loss":
            assert estimates.ref_logprobs is not None
            divergence, of_kl = kl_loss(
                logprobs,
                _take(estimates.ref_logprobs, micro),
                micro.mask,
                estimator=training.kl_estimator,
                **aggregated,
            )
            total = total + training.kl_coef * divergence
            if estimates.proximal_logprobs is None:
                means = means | {"kl_to_reference": of_kl["kl"]}
        (total * self._world_size).backward()
        metrics.add_loss("policy_loss", loss)
        metrics.add(means | {"entropy": _mean(entropies.detach(), micro.mask)}, float(micro.mask.sum()))
        if first:
            self._compare_logprobs(micro, estimates, logprobs.detach(), proximal, metrics)

    def _compare_logprobs(
        self,
        micro: Microbatch,
        estimates: _Estimates,
        logprobs: torch.Tensor,
        proximal: torch.Tensor,
        metrics: MetricSums,
    ) -> None:
        """Exactness: the engine's log-probabilities against ours, and the first ratio against 1."""
        tokens = float(micro.mask.sum())
        if tokens == 0:
            return
        difference = (logprobs - _take(estimates.sampling_logprobs, micro)).abs()[micro.mask]
        deviation = ((logprobs - proximal).exp() - 1.0).abs()[micro.mask]
        metrics.add(
            {
                "sampling_logprob_diff_mean": difference.mean(),
                "sampling_logprob_diff_max": difference.max(),
                "first_ratio_deviation_max": deviation.max(),
            },
            tokens,
        )

    def _values(self, micro: Microbatch) -> torch.Tensor:
        """``[tokens of input_ids]``, the critic's value of the state after each token."""
        output = self.critic.model(input_ids=micro.input_ids, position_ids=micro.position_ids, use_cache=False)
        return output.logits.float().flatten()

    def _logprobs(self, model: PreTrainedModel, micro: Microbatch) -> torch.Tensor:
        """``[B, T]`` log-probabilities of the completion tokens."""
        logits = self._logits(model, micro)
        flat = token_logprobs(logits, micro.targets, temperature=self._spec.temperature)
        return flat.flatten()[micro.completion_index]

    @staticmethod
    def _logits(model: PreTrainedModel, micro: Microbatch) -> torch.Tensor:
        output = model(
            input_ids=micro.input_ids, position_ids=micro.position_ids, logits_to_keep=micro.kept, use_cache=False
        )
        return output.logits


def _share_of_cores() -> int:
    """Cores a rank of this machine; Ray sets PyTorch's own default to one."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    return max(1, len(os.sched_getaffinity(0)) // ranks_here)


def _put(target: torch.Tensor, micro: Microbatch, rows: torch.Tensor) -> None:
    if len(micro.rows):
        target[micro.rows, : rows.shape[1]] = rows * micro.mask


def _take(source: torch.Tensor, micro: Microbatch) -> torch.Tensor:
    width = micro.mask.shape[1]
    if len(micro.rows) == 0:
        return torch.zeros(micro.mask.shape, device=source.device)
    return source[micro.rows, :width]


def _mean(x: torch.Tensor, mask: torch.Tensor) -> float:
    return float((x * mask).sum() / mask.sum().clamp(min=1))


def _write_pretrained(model: PreTrainedModel, full: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(path)
    if model.can_generate():
        model.generation_config.save_pretrained(path)
    save_file(
        {name: tensor.contiguous() for name, tensor in full.items()}, path / "model.safetensors", {"format": "pt"}
    )
