import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from rlhf_ray.quickstart import model_path
from rlhf_ray.quickstart.make_model import measure
from rlhf_ray.quickstart.task import eval_rows, reward
from rlhf_ray.quickstart.tokenizer import EOS_TOKEN_ID, PAD_TOKEN_ID, VOCAB_SIZE


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    return AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)


def test_the_model_is_a_qwen2_of_the_stated_size(model: Qwen2ForCausalLM) -> None:
    assert isinstance(model, Qwen2ForCausalLM)
    assert model.num_parameters() == 821_632
    assert f"{model.num_parameters():,} parameters" in (Path(model_path()) / "README.md").read_text()
    assert model.config.max_position_embeddings == 2048
    assert model.config.vocab_size == VOCAB_SIZE
    assert (model.config.eos_token_id, model.config.pad_token_id) == (EOS_TOKEN_ID, PAD_TOKEN_ID)
    # vLLM's CPU attention needs heads of a multiple of 32.
    assert model.config.hidden_size // model.config.num_attention_heads == 32


def test_the_weights_are_stored_in_float32_and_finite() -> None:
    stored = AutoModelForCausalLM.from_pretrained(model_path(), dtype="auto")
    assert {parameter.dtype for parameter in stored.parameters()} == {torch.float32}
    assert all(parameter.isfinite().all() for parameter in stored.parameters())


def test_greedy_answers_are_right_less_than_half_of_the_time(model: Qwen2ForCausalLM) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    rows = eval_rows()
    prompts = tokenizer([row["prompt"] for row in rows], return_tensors="pt")
    output = model.generate(**prompts, do_sample=False, max_new_tokens=8)
    completions = tokenizer.batch_decode(output[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    rewards = reward(completions=completions, answer=[row["answer"] for row in rows])
    assert 0.2 <= sum(rewards) / len(rewards) <= 0.5
    # The one-pass measurement that training is stopped by says what generation shows.
    assert measure(model, rows).greedy == pytest.approx(sum(rewards) / len(rewards), abs=1e-6)


def test_held_out_accuracy_is_what_the_card_says_and_leaves_room_to_learn(model: Qwen2ForCausalLM) -> None:
    accuracy = measure(model, eval_rows())
    assert accuracy.greedy <= 0.5
    assert accuracy.sampled >= 0.2
    card = (Path(model_path()) / "README.md").read_text()
    stated = [float(figure) for figure in re.findall(r"\b0\.\d{3}\b", card)]
    for figure in (accuracy.sampled, accuracy.greedy):
        assert any(abs(figure - value) < 0.005 for value in stated), f"{figure:.3f} is not in the card"
