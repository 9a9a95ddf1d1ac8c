"""Builds a learner rank's models: policy, critic and reference, sharded, with what scores tokens by them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_ray.learner.initial_weights import outline, reads_weights
from rlhf_ray.learner.layout import Microbatch
from rlhf_ray.learner.logprob_head import LogprobHead, TokenScorer, usable_head
from rlhf_ray.learner.lora import add_adapters
from rlhf_ray.learner.mesh import LearnerMesh
from rlhf_ray.learner.models import attention_kernels, freeze, load_critic, load_policy, reshard, shard
from rlhf_ray.learner.packed_rows import can_pack
from rlhf_ray.learner.sequence_parallel import SequenceSlices
from rlhf_ray.learner.spec import LearnerSpec
from rlhf_ray.learner.trained_model import TrainedModel
from rlhf_ray.losses import expected_value
from rlhf_ray.losses.chunked_logprobs import sums_halves_in_float32

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LearnerModels", "build_models"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerModels:
    """What a rank trains, and what it only reads."""

    policy: TrainedModel
    score: TokenScorer
    """Of the policy."""
    critic: TrainedModel | None
    """Only where the advantage asks for values."""
    reference: TokenScorer | None
    """Only where ``kl_coef`` is not 0; with adapters, the policy without them."""
    slices: SequenceSlices | None
    """Of sequences that the rank reads with its neighbors."""
    packed: bool
    """Whether microbatches are packed rows, so that plans must be made for these."""
    value_range: tuple[float, float] | None
    """Of a critic that predicts a distribution; ``None``: it predicts a number."""

    @property
    def trained(self) -> dict[str, TrainedModel]:
        """Policy and critic by name."""
        return {"policy": self.policy} | ({} if self.critic is None else {"critic": self.critic})

    def reshard(self) -> None:
        """Free what forward passes without backward ones left gathered."""
        for model in self.all():
            reshard(model)

    def all(self) -> list[PreTrainedModel]:
        """Every model."""
        reference = [] if self.reference is None else [self.reference.model]
        return [*(trained.model for trained in self.trained.values()), *reference]

    def values(self, micro: Microbatch) -> Tensor:
        """``[tokens of input_ids]``, the critic's value of the state after each token."""
        if self.value_range is not None:
            low, high = self.value_range
            return expected_value(self.value_logits(micro), low=low, high=high)
        assert self.critic is not None
        model = self.critic.model
        if self.slices is None:
            return model(**micro.model_inputs()).logits.float().flatten()
        sliced = model(**self.slices.shard(micro, model).model_inputs()).logits.float().squeeze(-1)
        return self.slices.gather_columns(sliced, micro).flatten()

    def value_logits(self, micro: Microbatch) -> Tensor:
        """``[tokens of input_ids, K]``, of the distribution over returns after each token."""
        assert self.critic is not None
        logits: Tensor = self.critic.model(**micro.model_inputs()).logits.float()
        return logits.flatten(0, -2)


def build_models(spec: LearnerSpec, mesh: LearnerMesh) -> LearnerModels:
    """Load, shard and test the models; a collective of all ranks."""
    training, learners, device, compute_dtype = spec.training, spec.learners, spec.device, spec.compute_dtype
    loading: dict[str, Any] = {
        "kernels": attention_kernels(spec.model.attn_implementation, device, compute_dtype),
        "trust_remote_code": spec.model.trust_remote_code,
        "with_weights": reads_weights(),
    }

    def sharded(model: PreTrainedModel, *, is_trained: bool = True, **more: Any) -> PreTrainedModel:
        return shard(
            model,
            mesh.ranks,
            compute_dtype=compute_dtype,
            gradient_checkpointing=learners.gradient_checkpointing and is_trained,
            compile_backend=learners.compile_backend,
            offload=learners.offload_optimizer if is_trained else learners.offload_reference,
            **more,
        )

    def scorer(model: PreTrainedModel, **more: Any) -> TokenScorer:
        head = LogprobHead.adopt(model)
        # Engines sample from weights of that type, too.
        in_half = head is not None and sums_halves_in_float32(device)
        model = sharded(model, head_dtype=compute_dtype if in_half else torch.float32, **more)
        head = usable_head(model, head, device, compute_dtype)
        return TokenScorer(model, head, temperature=spec.rollouts.temperature)

    policy = load_policy(spec.policy_path, **loading)
    frozen: PreTrainedModel | None = None
    if spec.lora is not None:
        add_adapters(policy, spec.lora)
    elif training.kl_coef > 0 and spec.reference_path is None:
        frozen = outline(policy)
        freeze(frozen, compute_dtype)
    score = scorer(policy)
    trained = TrainedModel(
        score.model, training, lr=training.lr, max_grad_norm=training.max_grad_norm, total_steps=spec.policy_steps
    )
    critic: TrainedModel | None = None
    if spec.critic_path is not None:
        critic = TrainedModel(
            sharded(load_critic(spec.critic_path, num_outputs=training.value_bins or 1, **loading)),
            training,
            lr=training.critic_lr,
            max_grad_norm=training.critic_max_grad_norm,
            total_steps=spec.critic_steps,
        )
    reference: TokenScorer | None = None
    if training.kl_coef > 0 and spec.reference_path is not None:
        other = load_policy(spec.reference_path, field="model.reference_path", **loading)
        freeze(other, compute_dtype)
        reference = scorer(other, is_trained=False)
    packed = can_pack(score, None if critic is None else critic.model, device, compute_dtype)
    if packed and reference is not None:
        packed = can_pack(reference, None, device, compute_dtype)
    slices: SequenceSlices | None = None
    if mesh.sequence is not None:
        slices = SequenceSlices(mesh.sequence, device, compute_dtype)
        slices.adopt_tested(score.model, "model.path", packed=packed)
        score = replace(score, slices=slices)
        if critic is not None:
            slices.adopt_tested(critic.model, "model.critic_path", packed=packed)
    if reference is not None and slices is not None:
        slices.adopt_tested(reference.model, "model.reference_path", packed=packed)
        reference = replace(reference, slices=slices)
    elif frozen is not None:  # The policy's weights, before any update.
        reference = replace(scorer(frozen, is_trained=False, source=policy), slices=slices)
        if slices is not None:
            slices.adopt(reference.model)
    elif training.kl_coef > 0 and reference is None:
        reference = replace(score, without_adapters=True)
    return LearnerModels(
        policy=trained,
        score=score,
        critic=critic,
        reference=reference,
        slices=slices,
        packed=packed,
        value_range=None if training.value_bins is None else training.value_range,
    )
