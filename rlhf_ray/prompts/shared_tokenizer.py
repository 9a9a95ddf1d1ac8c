"""prompts/: a tokenizer that the driver loaded, for the worker processes of Ray."""

from __future__ import annotations

import functools
import pickle
from typing import TYPE_CHECKING

from rlhf_ray.prompts.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from ray import ObjectRef
    from transformers import PreTrainedTokenizerBase

__all__ = ["SharedTokenizer"]


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

        self._path = path
        self._trust_remote_code = trust_remote_code
        self._pickled: ObjectRef | None = None
        tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        # A class that came with the tokenizer can be imported only where it was loaded from its files.
        if type(tokenizer).__module__.startswith("transformers."):
            self._pickled = ray.put(pickle.dumps(tokenizer))

    def get(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer, the same object each time in one process.

        Raises:
            ConfigError: Its class came with it, and it cannot be loaded on this machine.
        """
        if self._pickled is None:
            return load_tokenizer(self._path, trust_remote_code=self._trust_remote_code)
        return _unpickled(self._pickled)


@functools.lru_cache(maxsize=1)
def _unpickled(pickled: ObjectRef) -> PreTrainedTokenizerBase:
    import ray

    tokenizer: PreTrainedTokenizerBase = pickle.loads(ray.get(pickled))
    return tokenizer
