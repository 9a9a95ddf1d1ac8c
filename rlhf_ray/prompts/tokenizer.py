"""prompts/ and all that decodes: the one place where a tokenizer is loaded."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_ray.config.local_path import looks_local
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.hub import hub_lookup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["decoded", "load_tokenizer"]

# A folder with none of these holds no tokenizer that transformers can load; asked all the same, it makes an empty one
# for some architectures.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)
_REMEDY = "name a tokenizer's folder or hub id in model.tokenizer_path, or a model that has one in model.path"


@functools.cache
def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer once a process; later calls return the same object, so do not change it.

    Args:
        path: Local folder or hub id.
        trust_remote_code: Whether to run code that ships with the tokenizer.

    Raises:
        ConfigError: The folder is missing or holds no tokenizer, the hub has none under that id or cannot be reached,
            or the files cannot be loaded.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        if not any((local / name).is_file() for name in _TOKENIZER_FILES):
            raise ConfigError("model.path", path, f"the folder holds no tokenizer ({_TOKENIZER_FILES[0]}); {_REMEDY}")
        path = str(local)
    elif local.exists():
        raise ConfigError("model.path", path, f"it is a file, not a folder; {_REMEDY}")
    elif looks_local(path):
        raise ConfigError("model.path", path, f"there is no such folder ({local.absolute()}); {_REMEDY}")
    return _load(path, trust_remote_code=trust_remote_code)


def decoded(tokenizer: Any, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
    """The text of a completion.

    Models have embeddings for more tokens than their tokenizers know, up to a round number, and may sample one: it
    stands for no text.
    """
    try:
        return str(tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))
    except (IndexError, KeyError, TypeError, ValueError):  # Of tokenizers in Python; those in Rust leave it out.
        known = frozenset(tokenizer.get_vocab().values())
        known_ids = [token for token in token_ids if token in known]
        return str(tokenizer.decode(known_ids, skip_special_tokens=skip_special_tokens))


def _load(path: str, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        with hub_lookup(path):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                path, trust_remote_code=trust_remote_code
            )
    # A damaged file, an unknown class, a missing package and an unreachable hub each have a type of their own.
    except Exception as failure:
        remedy = f"no tokenizer could be loaded ({type(failure).__name__}: {_first_line(failure)}); {_REMEDY}"
        raise ConfigError("model.path", path, remedy) from failure
    return tokenizer


def _first_line(failure: Exception) -> str:
    return next(iter(str(failure).splitlines()), "")
