"""One learner rank: estimates, advantages and optimizer steps over its share of a batch.

Consumes a :class:`SequenceBatch` and its :class:`RankPlan`; produces updated policy and critic, and the metrics of the
update. Plain class on ``torch.distributed``, no Ray: the train loop (remote/train_loop.py) constructs and drives it.
All ranks call the same methods in step.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from rlhf_ray.advantages import kl
from rlhf_ray.advantages.padding import blank
from rlhf_ray.errors import LearnerError
from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.learner.build import build_models
from rlhf_ray.learner.credit import CreditAssignment, merged_moments
from rlhf_ray.learner.estimates import Estimates, scatter_rows
from rlhf_ray.learner.finite import MOST_SKIPPED, FiniteGuard
from rlhf_ray.learner.kept_state import KeptState
from rlhf_ray.learner.layout import Microbatch, lay_out
from rlhf_ray.learner.mesh import LearnerMesh
from rlhf_ray.learner.metrics import MetricSums
from rlhf_ray.learner.models import fix_sdpa_kernels, head_is_new, set_head_bias
from rlhf_ray.learner.objective import policy_objective
from rlhf_ray.learner.off_policy import correction_weights, effective_sample_size, m2po_kept, staleness_metrics
from rlhf_ray.learner.packing import Indices, RankPlan
from rlhf_ray.learner.process_memory import return_freed_tensors
from rlhf_ray.learner.proximal import LoglinearProximal, RecomputedProximal
from rlhf_ray.learner.spec import LearnerSpec
from rlhf_ray.learner.state import LearnerState
from rlhf_ray.learner.steps import Step, steps_of
from rlhf_ray.losses import aggregate, global_normalizer, hl_gauss_loss, value_loss
from rlhf_ray.types import Float32Array, TokenEstimates

__all__ = ["Learner", "LearnerSpec"]

_GRAD_NORMS = {"policy": "grad_norm", "critic": "critic_grad_norm"}
_REMEDY = "the weights are those before this step, which training.nonfinite_updates = skip leaves out"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Update:
    """What the steps of one update share."""

    microbatches: Mapping[Indices, tuple[Microbatch, Estimates]]
    """With what is known of them before the first step, by their sequences."""
    estimates: Estimates
    proximal: RecomputedProximal
    metrics: MetricSums
    guard: FiniteGuard
    update_policy: bool


class Learner(LearnerState):
    """Policy, critic and reference of one rank, on an initialized process group.

    Args:
        spec: How models are built.
        kept: Where copies of its state lie; ``None``: in memory that is freed when a checkpoint has been written.

    Attributes:
        token_estimates: Of the last update's sequences, where it was asked to keep them.
    """

    def __init__(self, spec: LearnerSpec, kept: KeptState | None = None) -> None:
        return_freed_tensors()
        fix_sdpa_kernels()
        if (num_threads := spec.threads(dist.get_world_size())) is not None:
            torch.set_num_threads(num_threads)
        self._device = spec.device
        self._training = spec.training
        self._mesh = LearnerMesh.of(self._device.type, spec.sequence_parallel)
        self._loss = spec.loss.loaded()
        credit = CreditAssignment(spec.training, spec.advantage.loaded(), self._mesh.data)
        super().__init__(spec, build_models(spec, self._mesh), credit, kept)
        self._kl_in_reward = self._models.reference is not None and spec.training.kl_in == "reward"
        self.token_estimates: tuple[TokenEstimates, ...] | None = None

    def close(self) -> None:
        """Give back what the process would keep, when nothing is being copied or saved any more."""
        self.wait_copied()
        self._saving.shutdown()
        self._mesh.close()

    def update(
        self, batch: SequenceBatch, plan: RankPlan, *, update_policy: bool = True, keep_estimates: bool = False
    ) -> dict[str, float]:
        """Train on one batch; returns the metrics of the update, the same on every rank.

        Args:
            batch: This rank's sequences.
            plan: Minibatches, microbatches and epochs over them.
            update_policy: False in the critic's warm-up.
            keep_estimates: Whether to leave those of tokens in :attr:`token_estimates`.

        Raises:
            LearnerError: A number is not finite, and ``training.nonfinite_updates`` ends the run by it; on every rank,
                with weights, moments and schedules as they were before the step that would have read it.
        """
        trained = self._trained()
        started = time.perf_counter()
        sums = MetricSums()
        kl_coef = self._credit.kl_coef
        try:
            if self._training.value_init == "reward_mean":
                self._start_values_at_mean(batch)
            run, result = self._prepare(batch, plan, sums, update_policy=update_policy or self._has_warmed_up)
            self.token_estimates = _for_report(batch, run.estimates) if keep_estimates else None
            estimated = time.perf_counter()
            skipped = 0
            has_critic = self.critic is not None
            steps = tuple(steps_of(plan, self._training, policy=run.update_policy, critic=has_critic))
            for number, step in enumerate(steps):
                skipped += not self._step(run, step, first=number == 0)
        finally:
            self._models.reshard()
        self._check_finite("kept after an update, whose learning rate may be too high")
        of_losses = {"value_loss": sum(step.critic_steps for step in steps)}
        merged = sums.merge(sum(step.policy for step in steps), self._mesh.data, of_losses=of_losses)
        result |= effective_sample_size(merged)
        if self._models.reference is not None:
            result["kl_coef"] = kl_coef
            self._credit.adapt(result.get("kl_to_reference"), sum(len(m.completion_lengths) for m in plan.minibatches))
        if self._training.nonfinite_updates == "skip":
            result["skipped_updates"] = float(skipped)
        result |= {"lr" if name == "policy" else "critic_lr": model.lr for name, model in trained.items()}
        return result | {"advantage_s": estimated - started, "update_s": time.perf_counter() - estimated}

    @property
    def _has_warmed_up(self) -> bool:
        """Whether the critic's warm-up ended before its iterations were over."""
        return self._training.critic_warmup_explained_variance is not None and self.policy.steps_taken > 0

    def _start_values_at_mean(self, batch: SequenceBatch) -> None:
        """Before the first step of a critic whose head is new: predict the mean reward everywhere."""
        critic = self.critic
        if critic is not None and critic.steps_taken == 0 and head_is_new(critic.model):
            rewards = torch.tensor(batch.rewards, device=self._device)
            (of_rewards,) = merged_moments(self._mesh.data, torch.ones_like(rewards, dtype=torch.bool), rewards)
            if math.isfinite(of_rewards.mean):  # Else no step is made either.
                self._change()
                set_head_bias(critic.model, of_rewards.mean)

    def _prepare(
        self, batch: SequenceBatch, plan: RankPlan, sums: MetricSums, *, update_policy: bool
    ) -> tuple[_Update, dict[str, float]]:
        """All that is known before the first step, and metrics of the advantages."""
        microbatches = {
            rows: lay_out(batch, rows, packed=self.packed, device=self._device)
            for minibatch in plan.minibatches
            for rows in minibatch.microbatches
        }
        enough = None if update_policy else self._training.critic_warmup_explained_variance
        # Where this batch may end the warm-up, the policy is trained on it.
        reads_policy = update_policy or enough is not None
        estimates, proximal = self._estimate(batch, microbatches, plan, update_policy=reads_policy)
        self._models.reshard()  # Else the reference's output layer stays gathered for all steps.
        estimates, result = self._credit.assign(batch, estimates, sums, warms_up=not update_policy)
        update_policy = update_policy or (enough is not None and result["explained_variance"] >= enough)
        threshold = self._training.m2po_threshold
        if threshold is not None and update_policy:
            kept = estimates.mask.clone()
            for minibatch in plan.minibatches:
                rows = torch.tensor(list(itertools.chain(*minibatch.microbatches)), device=self._device).long()
                kept[rows] = m2po_kept(estimates, rows, threshold=threshold, group=self._mesh.data)
            estimates = replace(estimates, kept=kept)
        guard = FiniteGuard(batch, estimates, plan.sequences)
        if self._training.nonfinite_updates == "error" and (refusal := guard.refusal({})):
            raise LearnerError(f"{refusal}; {_REMEDY}")
        run = _Update(
            microbatches={rows: (micro, estimates.rows(micro)) for rows, micro in microbatches.items()},
            estimates=estimates,
            proximal=proximal,
            metrics=sums,
            guard=guard,
            update_policy=update_policy,
        )
        return run, result

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _estimate(
        self,
        batch: SequenceBatch,
        microbatches: Mapping[Indices, Microbatch],
        plan: RankPlan,
        *,
        update_policy: bool,
    ) -> tuple[Estimates, RecomputedProximal]:
        """Values, and log-probabilities under the policy before the update and under the reference."""
        estimates, reference = Estimates.of(batch, self._device), self._models.reference
        empty = torch.zeros_like(estimates.sampling_logprobs)
        values, bootstrap = empty.clone(), empty.new_zeros(len(batch))
        ref_logprobs = empty.clone() if reference is not None and (self._kl_in_reward or update_policy) else None
        needed_before = self._kl_in_reward or self._training.m2po_threshold is not None
        proximal_class = LoglinearProximal if self._training.proximal == "loglinear" else RecomputedProximal
        proximal = proximal_class(empty, needed_before=needed_before)
        for index, minibatch in enumerate(plan.minibatches):
            for rows in minibatch.microbatches:
                micro = microbatches[rows]
                if self.critic is not None:
                    after = self._models.values(micro)
                    scatter_rows(values, micro, after[micro.value_index])
                    bootstrap[micro.rows] = after[micro.last_index[: len(micro.rows)]]
                if (self._kl_in_reward or update_policy) and proximal.needs_pass(first=index == plan.epochs[0][0]):
                    proximal.put(micro, self._models.score.logprobs(micro))
                if reference is not None and ref_logprobs is not None:
                    scatter_rows(ref_logprobs, micro, reference.logprobs(micro))
        return replace(
            estimates,
            proximal_logprobs=proximal.logprobs if needed_before else None,
            values=None if self.critic is None else values,
            bootstrap=None if self.critic is None else bootstrap * torch.tensor(batch.truncated, device=self._device),
            ref_logprobs=ref_logprobs,
        ), proximal

    def _step(self, run: _Update, step: Step, *, first: bool) -> bool:
        """One optimizer step of critic and policy over a minibatch; false where it was skipped."""
        minibatch, trained = step.minibatch, self._trained()
        run.guard.begin(itertools.chain.from_iterable(minibatch.microbatches))
        mode, longest = self._training.loss_aggregation, self._spec.rollouts.max_new_tokens
        of_policy, of_critic = (
            global_normalizer(lengths, mode, max_length=longest)
            for lengths in (minibatch.completion_lengths, step.critic_lengths)
        )
        stepped = {
            name: trained[name] for name, steps in (("policy", step.policy), ("critic", step.critic_steps)) if steps
        }
        last = len(minibatch.microbatches) - 1
        for position, rows in enumerate(minibatch.microbatches):
            micro, known = run.microbatches[rows]

            def of_rows(denominator: float, known: Estimates = known) -> float | torch.Tensor:
                if mode == "seq_mean_token_mean" and known.trajectory_share is not None:
                    return max(denominator, 1.0) / known.trajectory_share
                return denominator

            for name, model in trained.items():
                # Unreduced, the gradients of a whole model would stay on every GPU; on CPUs each reduction costs more.
                is_last = position == last and name in stepped
                model.model.set_requires_gradient_sync(is_last or self._device.type == "cuda")
            if step.critic:
                self._backward_critic(run, micro, known, of_rows(of_critic))
            if step.policy:
                self._backward_policy(run, micro, known, of_rows(of_policy), minibatch.successful_tokens, first=first)
        norms = {name: model.grad_norm() for name, model in stepped.items()}
        refusal = run.guard.refusal(norms)
        run.metrics.add({_GRAD_NORMS[name]: norm for name, norm in norms.items()}, 1.0)
        self._change()
        for name, model in trained.items():
            if refusal is not None:
                model.drop_gradients()
            elif name in stepped:
                model.step(norms[name])
        self._skipped_in_a_row = 0 if refusal is None else self._skipped_in_a_row + 1
        if refusal is not None and self._training.nonfinite_updates == "error":
            raise LearnerError(f"{refusal}; {_REMEDY}")
        if self._skipped_in_a_row >= MOST_SKIPPED:
            raise LearnerError(f"{MOST_SKIPPED} optimizer steps in a row were skipped, the last one for: {refusal}")
        return refusal is None

    def _backward_critic(
        self, run: _Update, micro: Microbatch, known: Estimates, normalizer: float | torch.Tensor
    ) -> None:
        assert known.values is not None
        assert known.returns is not None
        aggregated: dict[str, Any] = {"aggregation": self._training.loss_aggregation, "normalizer": normalizer}
        if self._models.value_range is not None:
            low, high = self._models.value_range
            found = self._models.value_logits(micro)[micro.value_index]
            smoothing = self._training.value_smoothing
            loss, means = hl_gauss_loss(
                found, known.returns, known.mask, low=low, high=high, smoothing=smoothing, **aggregated
            )
            run.guard.look("values", micro, found.detach().sum(dim=-1))
        else:
            found = self._models.values(micro)[micro.value_index]
            clip, huber = self._training.value_clip, self._training.value_huber
            loss, means = value_loss(
                found, known.values, known.returns, known.mask, clip=clip, huber=huber, **aggregated
            )
            run.guard.look("values", micro, found)
        run.guard.look("value loss", micro, loss)
        # FSDP averages gradients over ranks; the global denominator wants their sum.
        (loss * dist.get_world_size()).backward()
        run.metrics.add_loss("value_loss", loss)
        run.metrics.add(means, len(micro.scored))

    def _backward_policy(
        self,
        run: _Update,
        micro: Microbatch,
        known: Estimates,
        normalizer: float | torch.Tensor,
        successful_tokens: int,
        *,
        first: bool,
    ) -> None:
        metrics = run.metrics
        logprobs, entropies = self._models.score(micro, entropy_gradient=self._training.entropy_coef != 0.0)
        proximal = run.proximal.of_step(micro, logprobs, known, first=first)
        weights: torch.Tensor | None = None
        of_weights: dict[str, torch.Tensor] = {}
        if self._spec.rollouts.is_off_policy:
            weights, of_weights = correction_weights(self._training, known, proximal)
            for of_distance, tokens in staleness_metrics(known, micro, proximal):
                metrics.add(of_distance, tokens)
        total, loss, means = policy_objective(
            self._training,
            self._loss,
            known,
            logprobs=logprobs,
            entropies=entropies,
            proximal_logprobs=proximal,
            behavior_weights=weights,
            normalizer=normalizer,
            successful_tokens=successful_tokens,
            kl_coef=self._credit.kl_coef,
        )
        run.guard.look("log-probabilities", micro, logprobs, proximal)
        run.guard.look("policy loss", micro, loss, total)
        (total * dist.get_world_size()).backward()
        metrics.add_loss("policy_loss", loss)
        if (nll := means.pop("nll_loss", None)) is not None:
            metrics.add_loss("nll_loss", nll)
        means = means | of_weights | {"entropy": aggregate(entropies.detach(), micro.mask, "token_mean")}
        if known.ref_logprobs is not None and not self._kl_in_reward:
            penalty = kl(proximal, known.ref_logprobs, estimator=self._training.kl_estimator)
            means["kl_to_reference"] = aggregate(penalty, micro.mask, "token_mean")
        metrics.add(means, len(micro.scored))
        if first:
            self._compare_logprobs(micro, known, logprobs.detach(), proximal, metrics)

    def _compare_logprobs(
        self,
        micro: Microbatch,
        known: Estimates,
        logprobs: torch.Tensor,
        proximal: torch.Tensor,
        metrics: MetricSums,
    ) -> None:
        """Exactness: the engine's log-probabilities against ours, and the first ratio against 1."""
        # An engine keeps what it computed of earlier tokens under older weights: one stale token touches all others.
        if micro.num_on_policy:
            mask = known.mask & known.on_policy
            difference = blank((logprobs - known.sampling_logprobs).abs(), mask)
            mean = aggregate(difference, mask, "token_mean")
            metrics.add(
                {"sampling_logprob_diff_mean": mean, "sampling_logprob_diff_max": difference.max()},
                micro.num_on_policy,
            )
        if self._kl_in_reward:  # Elsewhere they are one tensor.
            deviation = blank(((logprobs - proximal).exp() - 1.0).abs(), micro.mask)
            metrics.add({"first_ratio_deviation_max": deviation.max()}, len(micro.scored))


def _for_report(batch: SequenceBatch, estimates: Estimates) -> tuple[TokenEstimates, ...]:
    def rows(table: torch.Tensor) -> list[Float32Array]:
        in_loss = table.float().masked_fill(~estimates.mask, math.nan).cpu().numpy()
        return [row[:length] for row, length in zip(in_loss, batch.completion_lengths, strict=True)]

    assert estimates.advantages is not None
    advantages = rows(estimates.advantages)
    values = [None] * len(advantages) if estimates.values is None else rows(estimates.values)
    return tuple(TokenEstimates(advantages=one, values=its) for one, its in zip(advantages, values, strict=True))
