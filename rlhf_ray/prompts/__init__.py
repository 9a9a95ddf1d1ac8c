"""Ray Data: dataset rows in, ``Prompt`` out; streamed, in an order that can be resumed at any position."""

from __future__ import annotations

from rlhf_ray.prompts.stream import PromptStream
from rlhf_ray.prompts.tokenizer import load_tokenizer

__all__ = ["PromptStream", "load_tokenizer"]
