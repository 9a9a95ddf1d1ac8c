from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rlhf_ray.learner.logprob_head import TokenScorer
from rlhf_ray.learner.packed_rows import keeps_sequences_apart, skips_other_sequences, takes_lengths
from rlhf_ray.learner.varlen_attention import register

VOCABULARY = 40
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def is_kept_apart(model: torch.nn.Module) -> bool:
    return keeps_sequences_apart(
        TokenScorer(model, None, temperature=1.0),
        vocabulary_size=VOCABULARY,
        device=torch.device("cpu"),
        compute_dtype=torch.float32,
    )


class Remembers(torch.nn.Module):
    """A model whose layers have a state that runs over the whole row, whatever the positions say."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(VOCABULARY, 16)
        self.state = torch.nn.GRU(16, 16, batch_first=True)
        self.output = torch.nn.Linear(16, VOCABULARY)

    def forward(self, *, input_ids: torch.Tensor, logits_to_keep: torch.Tensor, **_: Any) -> SimpleNamespace:
        states, _ = self.state(self.embedding(input_ids))
        return SimpleNamespace(logits=self.output(states[:, logits_to_keep]))


# nemotron passes no lengths on, and only masks of other kernels are made of positions; stablelm likewise.
@pytest.mark.parametrize(
    ("kind", "kernel", "apart"),
    [
        *(("qwen2", kernel, True) for kernel in ("sdpa", "eager", "varlen")),
        *(("llama", kernel, True) for kernel in ("sdpa", "varlen")),
        *(("nemotron", kernel, kernel == "sdpa") for kernel in ("sdpa", "varlen")),
    ],
)
def test_attention_that_hears_of_sequences_keeps_them_apart(kind: str, kernel: str, apart: bool) -> None:
    torch.manual_seed(0)
    register()
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SIZES), attn_implementation=kernel).eval()
    for parameter in model.parameters():
        # Fresh weights are so small that a leak would hardly show.
        torch.nn.init.normal_(parameter, std=0.5) if parameter.ndim > 1 else None
    assert takes_lengths(model)
    assert is_kept_apart(model) == apart


@torch.no_grad()  # type: ignore[untyped-decorator]
def test_flex_attention_keeps_sequences_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forward pass runs on CPUs, as it is: compiling it takes half a minute."""
    monkeypatch.setattr("torch.compile", lambda function, **_: function)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["qwen2"](**SIZES), attn_implementation="flex_attention")
    for parameter in model.eval().parameters():
        torch.nn.init.normal_(parameter, std=0.5) if parameter.ndim > 1 else None
    assert is_kept_apart(model)


def test_kernels_that_skip_other_sequences() -> None:
    packing = ("varlen", "flex_attention", "flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2")
    assert all(map(skips_other_sequences, packing))
    assert not any(map(skips_other_sequences, ("sdpa", "eager", "kernels-community/other")))


def test_a_model_without_further_arguments_takes_no_lengths() -> None:
    class Closed(torch.nn.Module):
        def forward(self, *, input_ids: torch.Tensor, position_ids: torch.Tensor, use_cache: bool) -> None: ...

    assert not takes_lengths(Closed())


def test_a_state_that_runs_on_is_seen() -> None:
    assert not is_kept_apart(Remembers())
