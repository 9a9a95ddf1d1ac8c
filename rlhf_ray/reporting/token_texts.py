"""Which token wrote which part of a completion.

The texts of a completion's tokens, joined, are the completion's text. A token whose last byte ends no character has
the text ``""``; the token that completes the character has all of it. Special tokens, EOS among them, have ``""``.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

from rlhf_ray.prompts.tokenizer import decoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TokenTexts"]

Decode: TypeAlias = Callable[[list[int]], str]

# What decoders write for bytes that are no character, or not yet one.
_REPLACEMENT = "�"
# A decoder may treat the first token of a text in its own way (drop its space), so some come before the one that is
# asked for.
_CONTEXT_TOKENS = 6
# A character has at most four bytes; a longer wait is for bytes that will never become one.
_MAX_WAIT_TOKENS = 4


class TokenTexts:
    """Splits completions into the texts of their tokens.

    Args:
        tokenizer: The one that decoded the completions.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._piece = lru_cache(maxsize=None)(self._read_piece)
        self._whole = lru_cache(maxsize=None)(self._read_whole)

    def split(self, token_ids: Sequence[int], text: str | None = None) -> list[str] | None:
        """``[T]`` texts of the tokens of a completion.

        Args:
            token_ids: ``[T]``
            text: The decoded completion, special tokens left out; unset: as this tokenizer decodes it.

        Returns:
            ``None`` where the tokenizer changes a text after it put the tokens together (it tidies spaces, say), so
            that no split is the right one.
        """
        ids = [int(token) for token in token_ids]
        text = decoded(self._tokenizer, ids) if text is None else text
        ways = (self._split_bytes, self._split_windows) if self._is_byte_level else (self._split_windows,)
        return next((texts for way in ways if "".join(texts := way(ids)) == text), None)

    def _split_bytes(self, ids: list[int]) -> list[str]:
        # Nearly all completions hold no character that is cut by a token: these take a tenth of the time.
        whole = [text for token in ids if (text := self._whole(token)) is not None]
        if len(whole) == len(ids):
            return whole
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        texts = [decoder.decode(self._piece(token)) for token in ids]
        if texts:
            texts[-1] += decoder.decode(b"", final=True)
        return texts

    def _split_windows(self, ids: list[int]) -> list[str]:
        decode, texts = self._decode, [""] * len(ids)
        read, before = 0, ""
        for end in range(1, len(ids) + 1):
            start = max(0, read - _CONTEXT_TOKENS)
            with_new = decode(ids[start:end])
            if with_new.endswith(_REPLACEMENT) and end < len(ids) and end - read < _MAX_WAIT_TOKENS:
                continue
            if not with_new.startswith(before):
                break  # No split can be right; the caller sees that the texts are not the whole.
            texts[end - 1] = with_new[len(before) :]
            read = end
            before = decode(ids[max(0, read - _CONTEXT_TOKENS) : read])
        return texts

    @cached_property
    def _is_byte_level(self) -> bool:
        from tokenizers.decoders import ByteLevel

        return isinstance(getattr(self._backend, "decoder", None), ByteLevel)

    @cached_property
    def _backend(self) -> Any:
        # The Rust tokenizer without the Python around it: most tokenizers have one, and it is ten times as fast.
        return getattr(self._tokenizer, "backend_tokenizer", None)

    @cached_property
    def _decode(self) -> Decode:
        if self._backend is not None:
            backend = self._backend
            return lambda ids: str(backend.decode(ids, skip_special_tokens=True))
        return lambda ids: decoded(self._tokenizer, ids)

    def _read_piece(self, token: int) -> bytes:
        piece = self._backend.id_to_token(token)
        if piece is None or token in self._special_ids:
            return b""
        try:
            return bytes(self._bytes[character] for character in piece)
        except KeyError:
            return str(piece).encode()  # An added token, which is written as it reads.

    def _read_whole(self, token: int) -> str | None:
        """Text of a token that is whole characters; ``None`` for others."""
        try:
            return self._piece(token).decode()
        except UnicodeDecodeError:
            return None

    @cached_property
    def _bytes(self) -> dict[str, int]:
        from rlhf_ray.quickstart.tokenizer import byte_vocabulary

        return byte_vocabulary()

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self._backend.get_added_tokens_decoder()
        return frozenset(token for token, description in added.items() if description.special)
