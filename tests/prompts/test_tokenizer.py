import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizer

from rlhf_ray.errors import ConfigError
from rlhf_ray.prompts.tokenizer import decoded, load_tokenizer


def test_a_tokenizer_is_loaded_once_a_process(tokenizer_path: str) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    assert tokenizer.decode(tokenizer("naïve 1+1=")["input_ids"]) == "naïve 1+1="
    assert load_tokenizer(tokenizer_path) is tokenizer


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path = '.*/nowhere': there is no such folder .*tokenizer_path"):
        load_tokenizer(str(tmp_path / "nowhere"))


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="it is a file, not a folder"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_a_folder_with_weights_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(ConfigError, match=r"the folder holds no tokenizer \(tokenizer\.json\).*tokenizer_path"):
        load_tokenizer(str(tmp_path))


def test_a_damaged_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{not json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(ConfigError, match="no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"no tokenizer could be loaded .*name a tokenizer's folder or hub id"):
        load_tokenizer("rlhf-ray-tests/no-such-model")


class InPython(PreTrainedTokenizer):
    """One of the tokenizers that raise for an id beyond their vocabulary."""

    pieces = ("a", "b", "c")

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def get_vocab(self) -> dict[str, int]:
        return {piece: index for index, piece in enumerate(self.pieces)}

    def _convert_id_to_token(self, index: int) -> str:
        return self.pieces[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def test_a_token_that_the_tokenizer_does_not_know_stands_for_no_text(tokenizer_path: str) -> None:
    tokenizer = InPython()
    with pytest.raises(IndexError):
        tokenizer.decode([0, 9, 2])
    assert decoded(tokenizer, [0, 9, 2]) == "ac"
    known = load_tokenizer(tokenizer_path)
    ids = known("1+1=")["input_ids"]
    assert decoded(known, [*ids, 10**6]) == decoded(known, ids) == "1+1="
