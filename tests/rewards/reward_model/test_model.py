from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from rlhf_ray import RewardModelReward, quickstart
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.quickstart.tokenizer import EOS_TOKEN_ID, VOCAB_SIZE, build_tokenizer
from rlhf_ray.rewards.reward_model.model import RewardModel, batches, conversation, unused_token_id


def load(path: str, **options: Any) -> RewardModel:
    return RewardModel(RewardModelReward(path, dtype="float32", **options))


def sequences(count: int, longest: int, *, seed: int = 0) -> list[list[int]]:
    """Some end with EOS, which is the pad token of many models."""
    rng = random.Random(seed)
    ids = [[rng.randrange(256) for _ in range(rng.randint(1, longest))] for _ in range(count)]
    return [[*one, EOS_TOKEN_ID] if index % 3 == 0 else one for index, one in enumerate(ids)]


def alone(path: str, ids: list[int], label: int = 0) -> float:
    """The score as transformers gives it for one sequence without padding."""
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return float(model(torch.tensor([ids])).logits[0, label])


@pytest.mark.parametrize("pad_token", [True, False])
def test_a_batch_scores_as_single_sequences(make: Callable[..., str], pad_token: bool) -> None:
    path = make(pad_token=pad_token)
    given = sequences(40, 60)
    together = load(path, max_tokens_per_batch=4096).scores(given)
    one_at_a_time = load(path, max_tokens_per_batch=1).scores(given)
    assert together.std() > 0.1
    np.testing.assert_allclose(together, one_at_a_time, atol=1e-5, rtol=0)
    for index in (0, 1, 39):
        assert together[index] == pytest.approx(alone(path, given[index]), abs=1e-5)


def test_without_a_pad_token_and_with_every_id_in_use_sequences_go_one_by_one(make: Callable[..., str]) -> None:
    path = make(pad_token=False, max_positions=512)
    given = [list(range(VOCAB_SIZE)), [5, EOS_TOKEN_ID]]
    assert load(path).scores(given) == pytest.approx([alone(path, ids) for ids in given], abs=1e-5)


def test_an_encoder_scores_a_batch_as_single_sequences(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        pad_token_id=256,
        initializer_range=0.3,
        num_labels=1,
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    model = load(str(tmp_path), tokenizer_path=quickstart.model_path())
    given = sequences(12, 60)
    expected = [alone(str(tmp_path), ids) for ids in given]
    assert model.scores(given) == pytest.approx(expected, abs=1e-5)


def test_soft_caps_of_attention_are_not_dropped(tmp_path: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16, "num_labels": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": VOCAB_SIZE, "pad_token_id": 256}
    reward_model = Gemma2ForSequenceClassification(
        Gemma2Config(**sizes, **heads, attn_logit_softcapping=0.5, initializer_range=0.5)
    ).eval()
    reward_model.save_pretrained(tmp_path)
    given = sequences(3, 40)

    scores = load(str(tmp_path), tokenizer_path=quickstart.model_path()).scores(given)

    expected, dropped = [], []
    for kernel, found in (("eager", expected), ("sdpa", dropped)):
        reward_model.set_attn_implementation(kernel)
        with torch.no_grad():
            found.extend(float(reward_model(torch.tensor([ids])).logits) for ids in given)
    assert scores == pytest.approx(expected, abs=1e-5)
    assert scores != pytest.approx(dropped, abs=1e-2)


def test_the_label_is_the_one_that_is_named(make: Callable[..., str]) -> None:
    path = make(num_labels=3)
    scores = [float(load(path, label=label).scores([[1, 2, 3]])[0]) for label in range(3)]
    assert scores == pytest.approx([alone(path, [1, 2, 3], label) for label in range(3)], abs=1e-5)
    assert len(set(scores)) == 3


def test_texts_are_encoded_as_the_reward_model_has_them(make: Callable[..., str]) -> None:
    tokenizer = build_tokenizer(max_length=64)
    (chat,) = load(make()).encoded(["1+1="], ["2"])
    assert tokenizer.decode(chat) == "user: 1+1=\nassistant: 2<eos>\n"
    (plain,) = load(make(chat_template=False)).encoded(["1+1="], ["2"])
    assert tokenizer.decode(plain) == "1+1=2"


def test_texts_get_the_special_tokens_that_the_reward_model_knows_once(make: Callable[..., str]) -> None:
    from tokenizers import processors

    path = make(chat_template=False)
    tokenizer = build_tokenizer(max_length=64)
    eos, bos = tokenizer.eos_token, tokenizer.pad_token
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (bos, eos)]
    around = processors.TemplateProcessing(single=f"{bos} $A {eos}", special_tokens=ids)
    tokenizer.backend_tokenizer.post_processor = around
    tokenizer.chat_template = None
    tokenizer.save_pretrained(path)
    sequences = load(path).encoded(["1+1=", f"{bos}1+1="], ["2", f"2{eos}"])
    assert [tokenizer.decode(sequence) for sequence in sequences] == [f"{bos}1+1=2{eos}"] * 2


def test_what_is_too_long_is_an_error_or_loses_its_start(model_path: str) -> None:
    with pytest.raises(DataError, match=r"a sequence of 5 tokens is longer than the reward model takes \(4\)"):
        load(model_path, as_chat=False, max_length=4).encoded(["abc"], ["de"])
    cut = load(model_path, as_chat=False, max_length=4, overlong="truncate_left")
    assert cut.encoded(["abc", "a"], ["de", "b"]) == [list(b"bcde"), list(b"ab")]
    with pytest.raises(DataError, match=r"longer than the reward model takes \(256\)"):
        load(model_path, as_chat=False).encoded(["a" * 250], ["b" * 7])
    with pytest.raises(DataError, match="empty prompt with an empty completion"):
        load(model_path, as_chat=False).encoded([""], [""])


def test_a_head_that_is_not_in_the_files_is_an_error(make: Callable[..., str]) -> None:
    from safetensors.torch import load_file, save_file

    path = make()
    weights = load_file(f"{path}/model.safetensors")
    del weights["score.weight"]
    save_file(weights, f"{path}/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks weights of a trained reward model \(score\.weight\)"):
        load(path)


@pytest.mark.parametrize("name", ["score.weight", "model.embed_tokens.weight"])
def test_weights_that_are_not_finite_are_found_at_the_start(name: str, make: Callable[..., str]) -> None:
    """The embedding of a token that few texts hold too."""
    path = make()
    model = AutoModelForSequenceClassification.from_pretrained(path)
    with torch.no_grad():
        model.get_parameter(name)[-1, -1] = float("nan")
    model.save_pretrained(path)
    with pytest.raises(ConfigError, match=f"its {name} is not finite: the file is damaged"):
        load(path)


def test_weights_that_the_type_cannot_hold_are_found_at_the_start(make: Callable[..., str]) -> None:
    path = make()
    model = AutoModelForSequenceClassification.from_pretrained(path)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 3.4e38
    model.save_pretrained(path)
    with pytest.raises(
        ConfigError, match=r"layers\.0\.mlp\.up_proj\.weight is not finite.* dtype is too narrow for it"
    ):
        RewardModel(RewardModelReward(path, dtype="bfloat16"))


def test_scores_of_a_half_precision_model_are_those_of_a_float32_head(make: Callable[..., str]) -> None:
    model = RewardModel(RewardModelReward(make(), dtype="bfloat16"))
    seen: list[torch.Tensor] = []
    model._model.model.register_forward_hook(lambda _, __, output: seen.append(output.last_hidden_state[0, -1]))
    given = [list(range(3, 40)), [7, 8, 9]]

    scores = [model.scores([ids])[0] for ids in given]

    whole = AutoModelForSequenceClassification.from_pretrained(model._reward.path)
    weight = whole.score.weight[0].bfloat16().float()  # As it was loaded.
    assert {state.dtype for state in seen} == {torch.bfloat16}
    assert scores == pytest.approx([float(state.float() @ weight) for state in seen], rel=1e-6)
    assert all(float(torch.tensor(score).bfloat16()) != score for score in scores)


def test_files_that_cannot_be_read(make: Callable[..., str]) -> None:
    path = make()
    Path(path, "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ConfigError, match="the model cannot be loaded"):
        load(path)


# --- texts and batches ------------------------------------------------------------------------------------------------

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1="}]


def test_chats_go_through_the_template_of_the_reward_model() -> None:
    tokenizer = build_tokenizer(max_length=64)
    assert conversation(CHAT, "2", tokenizer, chat=True) == "system: Be brief.\nuser: 1+1=\nassistant: 2<eos>\n"
    assert conversation("1+1=", "2", tokenizer, chat=True) == "user: 1+1=\nassistant: 2<eos>\n"


def test_a_completion_continues_the_message_that_the_prompt_ends_in() -> None:
    tokenizer = build_tokenizer(max_length=64)
    begun = [*CHAT, {"role": "assistant", "content": "It is "}]
    text = "system: Be brief.\nuser: 1+1=\nassistant: It is 2<eos>\n"
    assert conversation(begun, "2", tokenizer, chat=True) == text
    assert begun[-1]["content"] == "It is "


def test_without_a_template_texts_follow_each_other() -> None:
    tokenizer = build_tokenizer(max_length=64)
    assert conversation("1+1=", "2", tokenizer, chat=False) == "1+1=2"
    with pytest.raises(DataError, match=r"the prompt is a chat, .* tokenizer_path"):
        conversation(CHAT, "2", tokenizer, chat=False)


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "expected"),
    [
        ([3, 9, 1, 8], 18, [[1, 3], [0, 2]]),  # 2 x 9, then 2 x 3
        ([3, 9, 1, 8], 17, [[1], [3, 0], [2]]),
        ([3, 9, 1, 8], 1000, [[1, 3, 0, 2]]),
        ([50, 2], 10, [[0], [1]]),
        ([4, 4, 4], 8, [[0, 1], [2]]),
        ([], 8, []),
    ],
)
def test_batches_by_hand(lengths: list[int], max_tokens: int, expected: list[list[int]]) -> None:
    assert list(batches(lengths, max_tokens)) == expected


def test_every_sequence_is_in_one_batch() -> None:
    lengths = [(7 * i) % 31 + 1 for i in range(200)]
    found = list(batches(lengths, 64))
    assert sorted(index for batch in found for index in batch) == list(range(200))
    assert all(max(lengths[i] for i in batch) * len(batch) <= 64 for batch in found)


def test_an_id_that_no_sequence_has() -> None:
    assert unused_token_id([[0, 1], [3]], 5) == 2
    assert unused_token_id([[0, 1], [2]], 3) is None
