from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, LlamaTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from rlhf_ray.errors import ConfigError
from rlhf_ray.prompts.tokenizer import (
    SharedTokenizer,
    decoded,
    load_tokenizer,
    special_tokens_around,
    text_flaw,
    with_special_tokens,
)


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


# In workers.

CHAT = [{"role": "user", "content": "naïve?"}]


def in_worker(shared: SharedTokenizer) -> tuple[Any, Any, bool, bool]:
    import sys

    tokenizer = shared.get()
    return (
        tokenizer("naïve 1+1=")["input_ids"],
        tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False),
        shared.get() is tokenizer,
        "torch" in sys.modules,
    )


@pytest.mark.usefixtures("local_ray")
def test_a_worker_gets_the_same_tokenizer_and_imports_no_torch_for_it(make_tokenizer: Any) -> None:
    import ray

    path = make_tokenizer(begin=True)
    shared = SharedTokenizer(path, trust_remote_code=False)
    tokenizer = load_tokenizer(path)
    # A runtime environment of its own: a worker process in which no other task ran.
    run = ray.remote(num_cpus=0, runtime_env={"env_vars": {"FRESH": "1"}})(in_worker)
    ids, chat_ids, kept, torch_imported = ray.get(run.remote(shared), timeout=120)
    assert ids == tokenizer("naïve 1+1=")["input_ids"]
    assert chat_ids == tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert kept
    assert not torch_imported


@pytest.mark.usefixtures("local_ray")
def test_a_tokenizer_that_cannot_be_loaded_fails_in_the_driver(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such folder"):
        SharedTokenizer(str(tmp_path / "gone"), trust_remote_code=False)


CODE = """
from transformers import PreTrainedTokenizerFast


class OwnTokenizer(PreTrainedTokenizerFast):
    own = "yes"
"""


@pytest.mark.usefixtures("local_ray")
def test_a_tokenizer_with_code_of_its_own_is_loaded_where_it_is_used(
    make_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    folder = Path(make_tokenizer())
    (folder / "own.py").write_text(CODE)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    shared = SharedTokenizer(str(folder), trust_remote_code=True)
    assert shared.get().own == "yes"
    name, _, _ = ray.get(ray.remote(num_cpus=0)(describe).remote(shared), timeout=120)
    assert name == "OwnTokenizer"


def describe(shared: SharedTokenizer) -> tuple[str, str, int]:
    tokenizer = shared.get()
    return type(tokenizer).__name__, tokenizer.own, len(tokenizer("ab")["input_ids"])


# Special tokens.

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
