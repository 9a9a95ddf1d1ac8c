"""Groups to score, a tokenizer that needs no files, and a local Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import ray

from rlhf_ray.types import Prompt, PromptText, RolloutGroup, Trajectory, VersionSpan

EOS = 0


class CharacterTokenizer:
    """A token is a character; token 0 is special."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        assert all(type(token) is int for token in token_ids)
        return "".join(
            "<eos>" if token == EOS else chr(token) for token in token_ids if token or not skip_special_tokens
        )


def make_group(
    texts: Sequence[str] = ("one", "three"), *, prompt: PromptText = "Q", group_id: int = 7, **columns: Any
) -> RolloutGroup:
    """A group whose completions are ``texts``, each ended by EOS."""
    completions = []
    for text in texts:
        ids = np.array([*map(ord, text), EOS], dtype=np.int32)
        span = VersionSpan(version=0, start=0, end=len(ids))
        logprobs = np.full(len(ids), -1.0, dtype=np.float32)
        completions.append(
            Trajectory.single_turn(
                token_ids=ids, sampling_logprobs=logprobs, asked_version=0, version_spans=(span,), finish_reason="stop"
            )
        )
    row = Prompt(prompt_id=group_id, token_ids=np.array([1], dtype=np.int32), text=prompt, columns=columns)
    return RolloutGroup(group_id=group_id, prompt=row, trajectories=tuple(completions), replica_id="r0")


@pytest.fixture
def group_of() -> Callable[..., RolloutGroup]:
    return make_group


@pytest.fixture(scope="session")
def tokenizer() -> CharacterTokenizer:
    return CharacterTokenizer()


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A local Ray, unless one runs already; only what is started here is shut down."""
    if ray.is_initialized():
        yield
        return
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
