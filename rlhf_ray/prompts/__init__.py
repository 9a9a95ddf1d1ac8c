"""Ray Data: dataset rows in, ``Prompt`` out; streamed, in an order that can be taken up again anywhere."""

from __future__ import annotations

from rlhf_ray.prompts.evaluation_prompts import load_prompts
from rlhf_ray.prompts.order import PromptPosition
from rlhf_ray.prompts.stream import PromptStream
from rlhf_ray.prompts.tokenizer import load_tokenizer

__all__ = ["PromptPosition", "PromptStream", "load_prompts", "load_tokenizer"]
