"""Tokenizers: where all are loaded, how workers get them, and the special tokens that they put around a text."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_ray.config.local_path import looks_local
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.hub import hub_lookup
from rlhf_ray.untrusted_text import shortened

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ray import ObjectRef
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "SharedTokenizer",
    "decoded",
    "load_tokenizer",
    "read_chat_template",
    "special_tokens_around",
    "template_variables",
    "text_flaw",
    "turn_end",
    "with_chat_template",
    "with_special_tokens",
]

_MARKS = ("{{", "{%")


def read_chat_template(given: str | None, field: str = "data.chat_template") -> str | None:
    """The text of a template that a setting gives as text or as a file's path.

    Raises:
        ConfigError: The file cannot be read, or the text is no chat template.
    """
    if given is None:
        return None
    text = given if any(mark in given for mark in _MARKS) else _file_text(given, field)
    try:
        variables = template_variables(text)
    except Exception as failure:  # Jinja's own, and what its extensions raise.
        raise ConfigError(field, shortened(given, 80), f"it is no Jinja template: {failure}") from failure
    if "messages" not in variables:
        raise ConfigError(
            field, shortened(given, 80), "it never uses `messages`, so every chat would be the same prompt"
        )
    return text


@functools.lru_cache(maxsize=8)
def template_variables(template: str) -> frozenset[str]:
    """Names that a template reads and does not set itself."""
    import jinja2.meta
    from transformers.utils.chat_template_utils import _compile_jinja_template

    # transformers' own environment: it has the tags and filters that templates of models use.
    environment = _compile_jinja_template(template).environment
    return frozenset(jinja2.meta.find_undeclared_variables(environment.parse(template)))


def turn_end(tokenizer: PreTrainedTokenizerBase, template: str | None, arguments: Mapping[str, Any]) -> int | None:
    """The special token by which the template ends an assistant's turn; ``None`` where it has none, or cannot say."""
    chat = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    try:
        written = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, **arguments)
        begun = tokenizer.apply_chat_template(
            chat, chat_template=template, tokenize=False, continue_final_message=True, **arguments
        )
    # A template is a program that came with the model: it may raise anything.
    except Exception:
        return None
    ids = tokenizer(written[len(begun) :], add_special_tokens=False)["input_ids"]
    return next((token_id for token_id in ids if token_id in tokenizer.added_tokens_decoder), None)


def with_chat_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer with another template; itself where none is given."""
    if template is None:
        return tokenizer
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def _file_text(path: str, field: str) -> str:
    file = Path(path).expanduser()
    if not file.is_file():
        remedy = f"there is no such file ({file.absolute()}); a template's own text has {{{{ or {{% in it"
        raise ConfigError(field, path, remedy)
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as failure:
        raise ConfigError(field, path, f"the file cannot be read: {failure}") from failure


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

_PROBES = ("a", "1", ".")


@functools.cache
def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer once per process; later calls return the same object, so do not change it.

    Args:
        path: Local folder or hub id.
        trust_remote_code: Whether to run code that ships with the tokenizer.

    Raises:
        ConfigError: The folder is missing or holds no tokenizer, the hub has none under that id or cannot be reached,
            or the files cannot be loaded.
    """
    local = Path(path).expanduser()
    found = str(local) if local.is_dir() else path
    reason = None
    if local.is_dir():
        if not any((local / name).is_file() for name in _TOKENIZER_FILES):
            reason = f"the folder holds no tokenizer ({_TOKENIZER_FILES[0]})"
    elif local.exists():
        reason = "it is a file, not a folder"
    elif looks_local(path):
        reason = f"there is no such folder ({local.absolute()})"
    if reason is not None:
        raise ConfigError("model.path", path, f"{reason}; {_REMEDY}")

    from transformers import AutoTokenizer

    try:
        with hub_lookup(found):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                found, trust_remote_code=trust_remote_code
            )
    # A damaged file, an unknown class, a missing package and an unreachable hub each have a type of their own.
    except Exception as failure:
        first_line = next(iter(str(failure).splitlines()), "")
        remedy = f"no tokenizer could be loaded ({type(failure).__name__}: {first_line}); {_REMEDY}"
        raise ConfigError("model.path", found, remedy) from failure
    return tokenizer


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


# --- in workers -------------------------------------------------------------------------------------------------------


class SharedTokenizer:
    """Travels to workers in place of a path.

    A worker unpickles the tokenizer once, in a fifth of the time that ``AutoTokenizer`` takes there: that imports torch
    and most of transformers. It also needs neither the folder nor the hub on the worker's machine.

    Args:
        path: Local folder or hub id.
        trust_remote_code: Whether to run code that ships with the tokenizer.

    Raises:
        ConfigError: The tokenizer cannot be loaded.
    """

    def __init__(self, path: str, *, trust_remote_code: bool) -> None:
        import ray

        self._load = functools.partial(load_tokenizer, path, trust_remote_code=trust_remote_code)
        tokenizer = self._load()
        # A class that came with the tokenizer can be imported only where it was loaded from its files.
        travels = type(tokenizer).__module__.startswith("transformers.")
        self._pickled = ray.put(pickle.dumps(tokenizer)) if travels else None

    def get(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer, the same object each time in one process.

        Raises:
            ConfigError: Its class came with it, and it cannot be loaded on this machine.
        """
        return self._load() if self._pickled is None else _unpickled(self._pickled)


@functools.lru_cache(maxsize=1)
def _unpickled(pickled: ObjectRef) -> PreTrainedTokenizerBase:
    import ray

    tokenizer: PreTrainedTokenizerBase = pickle.loads(ray.get(pickled))
    return tokenizer


# --- special tokens ---------------------------------------------------------------------------------------------------


def special_tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before a text and after it.

    Raises:
        ConfigError: What it makes of a letter is not part of what it makes of it with special tokens.
    """
    for probe in _PROBES:
        bare = list(tokenizer(probe, add_special_tokens=False)["input_ids"])
        full = list(tokenizer(probe, add_special_tokens=True)["input_ids"])
        for start in range(len(full) - len(bare) + 1) if bare else ():
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
    remedy = "it cannot be told which special tokens it adds to a text; give prompts as chats, or another tokenizer"
    raise ConfigError("model.tokenizer_path", tokenizer.name_or_path, remedy)


def with_special_tokens(ids: Sequence[int], before: Sequence[int], after: Sequence[int] = ()) -> list[int]:
    """Put special tokens around the ids of a text, which may begin with the first or end with the last of its own.

    Args:
        ids: ``[T]``, without special tokens but those that the text itself holds.
        before: BOS and its like.
        after: EOS and its like; none for a text that a completion continues.

    Returns:
        ``[T + added]``.
    """
    start = [] if ids[:1] == before[:1] else before
    end = [] if ids[-1:] == after[-1:] else after
    return [*start, *ids, *end]


def text_flaw(text: str) -> str | None:
    """Say why no tokenizer takes a text: half of a surrogate pair, as JSON can write it, is no character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as failure:
        half = text[failure.start]
        return f"holds a lone surrogate, {half!r}, half of a character that was cut in two; fix the text"
    return None
