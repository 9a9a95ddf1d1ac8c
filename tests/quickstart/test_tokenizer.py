import unicodedata
from typing import Any

import pytest
from transformers import AutoTokenizer

from rlhf_ray.quickstart import model_path
from rlhf_ray.quickstart.tokenizer import EOS_TOKEN_ID, PAD_TOKEN_ID, VOCAB_SIZE, build_tokenizer

TEXTS = [
    "47+85=",
    "",
    "  two  spaces , and don't \r\n\ttabs \n\n",
    "Janet\u2019s ducks lay 16 eggs per day.\n#### 18 <<16-3-4=9>>9 $2 * 9 = $<<2*9=18>>18",
    "Grüße, façade, Ελλάδα, Привет, שלום, नमस्ते, 日本語, 한국어",
    "🤖👩‍👩‍👧🏳️‍🌈 🇪🇺",
    "é is not e, nor is \ufb01 fi",
    "\x00\x01\x7f\u00a0\u00ad\u2028\ufeff\U0010ffff",
    unicodedata.normalize("NFC", "".join(map(chr, range(0x800)))),
]


@pytest.fixture(scope="module", params=["built", "shipped"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return build_tokenizer(max_length=2048) if request.param == "built" else AutoTokenizer.from_pretrained(model_path())


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokens_of_a_text_are_its_bytes(tokenizer: Any, text: str) -> None:
    assert tokenizer(text)["input_ids"] == list(text.encode())


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_comes_back_whole(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer.decode([*text.encode(), EOS_TOKEN_ID, PAD_TOKEN_ID], skip_special_tokens=True) == text


def test_a_text_is_composed_first(tokenizer: Any) -> None:
    assert tokenizer("e\u0301")["input_ids"] == list("\u00e9".encode())


def test_each_of_the_256_bytes_is_a_token_of_its_own(tokenizer: Any) -> None:
    tokens = tokenizer.convert_ids_to_tokens(list(range(256)))
    assert len(set(tokens)) == 256
    assert tokenizer.convert_tokens_to_ids(tokens) == list(range(256))
    # Bytes from 128 on show only inside a character: 0x80-0xBF as its end, 0xC2-0xF4 as its start.
    assert tokenizer.decode([0xC3, 0xA9]) == "é"
    assert tokenizer.decode([0xFF]) == "\ufffd"


def test_the_vocabulary_is_the_bytes_and_two_special_tokens(tokenizer: Any) -> None:
    assert len(tokenizer) == VOCAB_SIZE == 258
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<pad>", PAD_TOKEN_ID)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<eos>", EOS_TOKEN_ID)
    assert tokenizer.bos_token is None
    assert tokenizer("1<eos><pad>")["input_ids"] == [ord("1"), EOS_TOKEN_ID, PAD_TOKEN_ID]
    assert tokenizer.model_max_length == 2048


def test_a_chat_becomes_lines_of_speakers(tokenizer: Any) -> None:
    chat = [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "1+1="},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "1+2="},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "system: Add.\nuser: 1+1=\nassistant: 2<eos>\nuser: 1+2=\nassistant: "
    assert tokenizer.apply_chat_template(chat[:2], tokenize=False) == "system: Add.\nuser: 1+1=\n"


def test_a_chat_is_tokenized_like_its_text(tokenizer: Any) -> None:
    chat = [{"role": "assistant", "content": "é"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == [*"assistant: é".encode(), EOS_TOKEN_ID, *b"\nassistant: "]
