from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.learner.layout import lay_out
from rlhf_ray.learner.logprob_head import LogprobHead, TokenScorer, _log_once, usable_head

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
    return usable_head(model, LogprobHead.adopt(model), CPU)


def batch() -> SequenceBatch:
    """Three sequences: prompts of 3, 1 and 2 tokens, completions of 2, 4 and 1."""
    prompts, completions = np.asarray([3, 1, 2], dtype=np.int32), np.asarray([2, 4, 1], dtype=np.int32)
    return SequenceBatch.single_turn(
        token_ids=np.arange(3, 16, dtype=np.int32), prompt_lengths=prompts, completion_lengths=completions
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
        logits = model(input_ids=micro.input_ids).logits
    tokens = micro.input_ids.flatten()[micro.value_index + 1]
    expected = torch.log_softmax(logits, -1).flatten(0, 1)[micro.value_index].gather(-1, tokens[..., None])[..., 0]

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


def test_the_model_itself_still_gives_logits() -> None:
    model, plain = model_of("qwen2"), model_of("qwen2")
    assert adopted_head(model) is not None
    ids = torch.arange(3, 9)[None]

    torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_the_way_through_whole_logits_is_logged_once_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    _log_once.cache_clear()
    model = model_of("gemma2", final_logit_softcapping=5.0).bfloat16()
    for _ in range(2):
        assert usable_head(model, LogprobHead.adopt(model), CPU, torch.bfloat16) is None
        model.lm_head.__class__ = torch.nn.Linear  # To be adopted anew.

    (record,) = caplog.records
    assert "Gemma2ForCausalLM: log-probabilities take whole logits" in record.message
    assert "not its output layer's product with the last hidden states" in record.message


class RoundsByRows(TorchDispatchMode):
    """Products that are rounded in another way with another number of rows, as on GPUs in half precision."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == "mm":
            noise = torch.randn(result.shape, generator=torch.Generator().manual_seed(len(result)))
            result = result * (1.0 + 2.0**-6 * noise).to(result.dtype)
        return result


def test_rounding_that_depends_on_the_number_of_rows_keeps_no_model_from_its_head() -> None:
    model = model_of("qwen2").bfloat16()
    with RoundsByRows():
        assert usable_head(model, LogprobHead.adopt(model), CPU, torch.bfloat16) is not None


def test_an_output_layer_of_another_kind_is_named_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    class Scaled(torch.nn.Linear):
        pass

    model = model_of("qwen2", tie_word_embeddings=False)
    model.lm_head = Scaled(16, 40, bias=False)

    assert adopted_head(model) is None
    assert "its output layer is of type Scaled" in caplog.text


def test_a_backbone_that_differs_from_pass_to_pass_by_rounding_keeps_its_head() -> None:
    model = model_of("qwen2").bfloat16()
    generator = torch.Generator().manual_seed(0)

    def rounded_anew(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        return output * (1.0 + 2**-8 * torch.randn(output.shape, generator=generator)).bfloat16()

    model.model.norm.register_forward_hook(rounded_anew)

    assert usable_head(model, LogprobHead.adopt(model), CPU, torch.bfloat16) is not None


def test_any_of_the_tokens_can_be_asked_for() -> None:
    model = model_of("qwen2")
    head = adopted_head(model)
    assert head is not None
    ids = torch.arange(3, 9)[None]
    rows, targets = torch.tensor([0, 2, 3]), torch.tensor([4, 6, 9])

    logprobs, entropies = model.score_tokens(head, {"input_ids": ids}, rows, targets, temperature=0.5)
    part, nothing = model.score_tokens(
        head, {"input_ids": ids}, rows[1:], targets[1:], temperature=0.5, with_entropy=False
    )

    wanted = torch.log_softmax(model(input_ids=ids).logits[0, rows] / 0.5, dim=-1)
    torch.testing.assert_close(logprobs, wanted.gather(-1, targets[:, None])[:, 0])
    torch.testing.assert_close(entropies, -(wanted.exp() * wanted).sum(-1))
    torch.testing.assert_close(part, logprobs[1:])
    assert nothing is None


def test_log_probabilities_alone_are_those_that_come_with_entropies() -> None:
    model = model_of("qwen2")
    micro = lay_out(batch(), [0, 1, 2], packed=False, device=CPU)
    for head in (adopted_head(model), None):
        score = TokenScorer(model, head, temperature=0.7)

        assert torch.equal(score.logprobs(micro), score(micro)[0])
