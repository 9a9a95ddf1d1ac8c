from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.learner.layout import lay_out
from rlhf_ray.learner.logprob_head import LogprobHead, TokenScorer

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def model_of(kind: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SIZES | changes))
    for parameter in model.parameters():
        # Fresh weights are so small that a scale of the logits would hardly show.
        torch.nn.init.normal_(parameter, std=0.5) if parameter.ndim > 1 else None
    return model


def adopted_head(model: PreTrainedModel) -> LogprobHead | None:
    """As a learner does, but for sharding the model."""
    head = LogprobHead.adopt(model)
    return head if head is not None and head.can_answer(model, CPU) else None


def batch() -> SequenceBatch:
    """Three sequences: prompts of 3, 1 and 2 tokens, completions of 2, 4 and 1."""
    prompts, completions = np.asarray([3, 1, 2], dtype=np.int32), np.asarray([2, 4, 1], dtype=np.int32)
    return SequenceBatch(
        token_ids=np.arange(3, 16, dtype=np.int32),
        prompt_lengths=prompts,
        completion_lengths=completions,
        sampling_logprobs=np.zeros(7, dtype=np.float32),
        staleness=np.zeros(7, dtype=np.int32),
        fresh=np.ones(3, dtype=np.bool_),
        rewards=np.zeros(3, dtype=np.float32),
        truncated=np.zeros(3, dtype=np.bool_),
        group_ids=np.arange(3),
        greedy_rewards=np.zeros(3, dtype=np.float32),
        loss_starts=np.zeros(3, dtype=np.int32),
    )


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "mistral", "olmo2"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_plain_output_layer_is_adopted_with_its_weights_and_names(kind: str, tied: bool) -> None:
    model = model_of(kind, tie_word_embeddings=tied)
    before = dict(model.named_parameters(remove_duplicate=False))

    assert adopted_head(model) is model.get_output_embeddings()
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("gemma2", {"final_logit_softcapping": 5.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 8.0}),
    ],
)
def test_a_model_that_works_on_its_logits_is_scored_the_plain_way(kind: str, changes: dict[str, Any]) -> None:
    model = model_of(kind, **changes)
    head = adopted_head(model)
    micro = lay_out(batch(), [0, 1, 2], packed=False, device=CPU)
    with torch.no_grad():
        logprobs, _ = TokenScorer(model, head, temperature=1.0)(micro)
        logits = model(input_ids=micro.input_ids, logits_to_keep=micro.kept).logits
    expected = torch.log_softmax(logits, -1).gather(-1, micro.targets[..., None]).flatten()[micro.completion_index]

    assert head is None
    torch.testing.assert_close(logprobs, expected * micro.mask)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_both_ways_give_the_same_numbers_and_gradients(temperature: float, entropy_gradient: bool) -> None:
    micro = lay_out(batch(), [0, 1, 2], packed=False, device=CPU)
    results = []
    for adopted in (True, False):
        model = model_of("qwen2", tie_word_embeddings=True)
        head = adopted_head(model) if adopted else None
        assert (head is not None) == adopted
        logprobs, entropies = TokenScorer(model, head, temperature=temperature)(
            micro, entropy_gradient=entropy_gradient
        )
        assert entropies.requires_grad == entropy_gradient
        weights = torch.linspace(-1.0, 2.0, logprobs.numel()).view_as(logprobs)
        loss = (logprobs * weights).mean() + ((entropies * weights).mean() if entropy_gradient else 0.0)
        loss.backward()
        grads = [parameter.grad for parameter in model.parameters()]
        results.append([logprobs.detach(), entropies.detach(), *grads])

    for given, wanted in zip(*results, strict=True):
        torch.testing.assert_close(given, wanted, atol=1e-6, rtol=1e-5)


def test_nothing_is_answered_outside_the_mask() -> None:
    model = model_of("qwen2")
    score = TokenScorer(model, adopted_head(model), temperature=1.0)
    micro = lay_out(batch(), [0, 1, 2], packed=False, device=CPU)
    logprobs, entropies = score(micro)

    assert bool((logprobs[~micro.mask] == 0).all()) and bool((entropies[~micro.mask] == 0).all())
    assert bool((logprobs[micro.mask] < 0).all()) and bool((entropies[micro.mask] > 0).all())


def test_an_empty_microbatch_still_reaches_every_weight() -> None:
    # Without it a rank with nothing to do would leave the others waiting in a collective.
    model = model_of("qwen2")
    logprobs, _ = TokenScorer(model, adopted_head(model), temperature=1.0)(
        lay_out(batch(), [], packed=False, device=CPU)
    )
    logprobs.sum().backward()

    assert logprobs.shape == (1, 1)
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_outside_a_question_the_model_gives_logits() -> None:
    model, plain = model_of("qwen2"), model_of("qwen2")
    assert adopted_head(model) is not None
    ids = torch.arange(3, 9)[None]

    torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits)
