from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from rlhf_ray.errors import ConfigError
from rlhf_ray.prompts.text_encoding import special_tokens_around, text_flaw, with_special_tokens

VOCABULARY = {token: index for index, token in enumerate(["[UNK]", "<s>", "</s>", "[CLS]", "[SEP]", "a", "b", "1"])}


def tokenizer(single: str, **special: str) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single=single, special_tokens=list(VOCABULARY.items()))
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


@pytest.mark.parametrize(
    ("single", "around"),
    [
        ("$A", ([], [])),
        ("<s> $A", ([1], [])),  # Llama
        ("<s> $A </s>", ([1], [2])),  # Llama with add_eos_token
        ("$A </s>", ([], [2])),  # T5
        ("[CLS] $A [SEP]", ([3], [4])),  # BERT
        ("<s> [CLS] $A </s> [SEP]", ([1, 3], [2, 4])),
    ],
)
@pytest.mark.parametrize("text", ["a", "a b 1", "z", ""])
def test_what_is_added_around_a_text(single: str, around: tuple[list[int], list[int]], text: str) -> None:
    tokenizer_ = tokenizer(single, bos_token="<s>", eos_token="</s>")
    assert special_tokens_around(tokenizer_) == around
    bare = tokenizer_(text, add_special_tokens=False)["input_ids"]
    assert with_special_tokens(bare, *around) == tokenizer_(text)["input_ids"]


def test_tokenizers_of_other_kinds() -> None:
    assert special_tokens_around(ByT5Tokenizer()) == ([], [1])  # Written in Python.
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "\u2581a": 3, "\u2581": 4, "a": 5}
    llama = LlamaTokenizer(vocab=vocabulary, merges=[("\u2581", "a")], add_bos_token=True, add_eos_token=True)
    assert special_tokens_around(llama) == ([1], [2])


def test_special_tokens_come_once() -> None:
    assert with_special_tokens([5], [1], [2]) == [1, 5, 2]
    assert with_special_tokens([1, 5, 2], [1], [2]) == [1, 5, 2]
    assert with_special_tokens([5], [1]) == [1, 5]
    assert with_special_tokens([], [1], [2]) == [1, 2]
    assert with_special_tokens([], []) == []


def test_a_tokenizer_that_cannot_be_understood() -> None:
    class Odd:
        name_or_path = "odd"

        def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, Any]:
            return {"input_ids": [1, 2] if add_special_tokens else [3]}

    with pytest.raises(ConfigError, match=r"model\.tokenizer_path = 'odd': it cannot be told"):
        special_tokens_around(Odd())  # type: ignore[arg-type]


def test_flaws_of_texts() -> None:
    assert text_flaw("a\0\U0001f600\ufffe") is None
    assert "'\\ud800'" in (text_flaw("a\ud800") or "")
