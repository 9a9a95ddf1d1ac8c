from __future__ import annotations

from typing import Any

import pytest

from rlhf_ray.prompts.tokenizer import load_tokenizer
from rlhf_ray.quickstart import model_path
from rlhf_ray.quickstart.tokenizer import EOS_TOKEN_ID
from rlhf_ray.reporting.token_texts import TokenTexts

TEXTS = ("", "42", "two words", "naïve", "1 € = 😀!", " spaces  kept \n", "नमस्ते", "a\u2028b", "</script>")


@pytest.fixture(scope="module")
def byte_tokenizer() -> Any:
    """The quickstart's: a token a byte."""
    return load_tokenizer(model_path())


@pytest.fixture(scope="module")
def merging_tokenizer() -> Any:
    """Byte-level BPE as most models have it, merges across characters included."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(TEXTS)] * 8, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.add_tokens(["<<"])
    return made


@pytest.fixture(scope="module")
def piece_tokenizer() -> Any:
    """As Llama's: a word begins with a mark that is a space, but for the first one; unknown characters are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁two", "▁words", "t", "w", "o"]
    tokenizer = Tokenizer(
        models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[], byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


@pytest.mark.parametrize("name", ["byte_tokenizer", "merging_tokenizer"])
@pytest.mark.parametrize("text", TEXTS)
def test_the_texts_of_the_tokens_are_the_text(name: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer(text)["input_ids"]
    texts = TokenTexts(tokenizer).split(ids, decoded(tokenizer, ids))
    assert texts is not None
    assert len(texts) == len(ids)
    assert "".join(texts) == text


def test_a_character_belongs_to_the_token_that_completes_it(byte_tokenizer: Any) -> None:
    assert TokenTexts(byte_tokenizer).split([*"é€x".encode(), EOS_TOKEN_ID], "é€x") == ["", "é", "", "", "€", "x", ""]


def test_a_character_that_is_cut_is_what_the_decoder_makes_of_it(byte_tokenizer: Any) -> None:
    ids = list("a€".encode()[:-1])
    text = decoded(byte_tokenizer, ids)
    assert text == "a\ufffd"
    assert TokenTexts(byte_tokenizer).split(ids, text) == ["a", "", "\ufffd"]


@pytest.mark.parametrize(
    ("ids", "texts"),
    [
        ([0xFF, 0x41], ["\ufffd", "A"]),
        ([0xE2, 0x82, 0x41, 0x42], ["", "", "\ufffdA", "B"]),
        ([0xC3, 0xC3, 0xA9], ["", "\ufffd", "é"]),
        ([0x80] * 6, ["\ufffd"] * 6),
    ],
)
def test_bytes_that_are_no_text_are_what_the_decoder_makes_of_them(
    byte_tokenizer: Any, ids: list[int], texts: list[str]
) -> None:
    assert decoded(byte_tokenizer, ids) == "".join(texts)
    assert TokenTexts(byte_tokenizer).split(ids, "".join(texts)) == texts


def test_special_tokens_have_no_text_and_added_ones_have_theirs(merging_tokenizer: Any) -> None:
    ids = merging_tokenizer.convert_tokens_to_ids(["<s>", "<<", "a", "</s>"])
    assert decoded(merging_tokenizer, ids) == "<<a"
    assert TokenTexts(merging_tokenizer).split(ids, "<<a") == ["", "<<", "a", ""]


def test_pieces_that_are_no_bytes_are_read_in_their_surroundings(piece_tokenizer: Any) -> None:
    ids = piece_tokenizer.convert_tokens_to_ids(["▁two", "▁words", "▁", "t", "w", "o", "<0xC3>", "<0xA9>", "</s>"])
    text = decoded(piece_tokenizer, ids)
    assert text == "two words twoé"
    # A space is the first word's own and goes with it; elsewhere it stays.
    assert TokenTexts(piece_tokenizer).split(ids, text) == ["two", " words", " ", "t", "w", "o", "", "é", ""]


def test_a_text_that_was_changed_afterward_has_no_split(byte_tokenizer: Any) -> None:
    assert TokenTexts(byte_tokenizer).split(list(b"a ."), "a.") is None


def test_no_tokens(byte_tokenizer: Any) -> None:
    assert TokenTexts(byte_tokenizer).split([], "") == []
