"""Tokenizer of the embedded quickstart model: text to bytes for ``prompts/``, bytes to text for ``rewards/``.

One token per byte of UTF-8, so that any text encodes and the model that adds numbers also runs GSM8K's prompts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer

__all__ = ["EOS_TOKEN_ID", "PAD_TOKEN_ID", "VOCAB_SIZE", "build_tokenizer", "byte_vocabulary"]

NUM_BYTES = 256
PAD_TOKEN, PAD_TOKEN_ID = "<pad>", NUM_BYTES
EOS_TOKEN, EOS_TOKEN_ID = "<eos>", NUM_BYTES + 1
VOCAB_SIZE = NUM_BYTES + 2

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] + ': ' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{{ 'assistant: ' if add_generation_prompt else '' }}"
)


def build_tokenizer(*, max_length: int) -> Qwen2Tokenizer:
    """Build the byte tokenizer: ids 0 to 255 are the bytes, then ``<pad>`` and ``<eos>``; nothing is added to a text.

    It is a ``Qwen2Tokenizer`` because ``AutoTokenizer`` makes one of the folder of any Qwen2 model, whatever its files
    say. As with all of them, a text is brought to Unicode's normal form C first, and comes back whole in that form.

    Args:
        max_length: The model's positions, in tokens.
    """
    from transformers import Qwen2Tokenizer

    return Qwen2Tokenizer(
        vocab={**byte_vocabulary(), PAD_TOKEN: PAD_TOKEN_ID, EOS_TOKEN: EOS_TOKEN_ID},
        merges=[],
        # Left out, it would be a 259th token, for which the model has no weights. No text has an unknown byte.
        unk_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def byte_vocabulary() -> dict[str, int]:
    """Map the byte-level alphabet of GPT-2 to byte values."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in sorted(bytes_to_unicode().items())}
