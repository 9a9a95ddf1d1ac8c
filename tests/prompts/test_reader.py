import pickle
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pytest

from rlhf_ray.config.settings import DataSettings
from rlhf_ray.errors import DataError
from rlhf_ray.prompts import reader
from rlhf_ray.prompts.builder import PromptBuilder
from rlhf_ray.prompts.reader import PromptReader
from rlhf_ray.prompts.rows import PromptOrder, RowTable
from rlhf_ray.prompts.tokenizer import SharedTokenizer
from rlhf_ray.types import Prompt

BUILDER = PromptBuilder(DataSettings(), source_name="rows", max_prompt_tokens=100, tokenizer_name="the tokenizer")


def make_reader(tokenizer_path: str, table: RowTable, order: PromptOrder, *, stop: int | None = None) -> PromptReader:
    tokenizer = SharedTokenizer(tokenizer_path, trust_remote_code=False)
    return PromptReader(table=table, order=order, builder=BUILDER, tokenizer=tokenizer, stop=stop)


def rows(count: int) -> RowTable:
    return RowTable.from_rows({"prompt": f"p{n}", "n": n} for n in range(count))


def read(source: PromptReader, start: int, stop: int) -> list[Prompt]:
    outcomes = [source.read(prompt_id) for prompt_id in range(start, stop)]
    source.close()
    return [outcome for outcome in outcomes if isinstance(outcome, Prompt)]


@pytest.mark.usefixtures("local_ray")
def test_prompts_come_in_order_over_blocks_tasks_runs_and_epochs(
    tokenizer_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_PROMPTS_PER_RUN", 25)
    monkeypatch.setattr(reader, "_PROMPTS_PER_TASK", 7)
    monkeypatch.setattr("rlhf_ray.prompts.rows._BLOCK_ROWS", 7)
    order = PromptOrder(20, seed=5, shuffle=True)
    prompts = read(make_reader(tokenizer_path, rows(20), order, stop=70), 13, 70)
    assert [prompt.prompt_id for prompt in prompts] == list(range(13, 70))
    assert [prompt.columns["n"] for prompt in prompts] == order.dataset_rows(13, 70).tolist()
    assert [prompt.text for prompt in prompts] == [f"p{n}" for n in order.dataset_rows(13, 70)]


@pytest.mark.usefixtures("local_ray")
def test_a_cluster_without_a_free_cpu_is_an_error_and_not_a_hang(
    tokenizer_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    class Holder:
        def ready(self) -> None:
            pass

    monkeypatch.setattr(reader, "_STALL_TIMEOUT_S", 2.0)
    holder = ray.remote(num_cpus=ray.cluster_resources()["CPU"])(Holder).remote()
    try:
        ray.get(holder.ready.remote(), timeout=60)
        starved = make_reader(tokenizer_path, rows(3), PromptOrder(3, seed=0, shuffle=True))
        with pytest.raises(DataError, match=r"making prompts made no progress for 2 s: Ray Data needs 0\.1 CPU"):
            starved.read(0)
    finally:
        ray.kill(holder)


class StallingRun:
    """Stands for an execution that delivers some prompts and then stalls."""

    def __init__(self, prompt_ids: range) -> None:
        self._prompt_ids = prompt_ids

    def iterator(self) -> Self:
        return self

    def iter_batches(self, **_: Any) -> Iterator[pa.Table]:
        from ray.data.exceptions import ExecutionTimeoutError

        for start in (self._prompt_ids.start, self._prompt_ids.start + 2):
            ids = self._prompt_ids[start - self._prompt_ids.start : start - self._prompt_ids.start + 2]
            prompts = [Prompt(prompt_id=i, token_ids=np.zeros(1, np.int32), text="") for i in ids]
            yield pa.table({"outcome": pa.array([pickle.dumps(prompt) for prompt in prompts], pa.large_binary())})
        if len(self._prompt_ids) > 4:
            raise ExecutionTimeoutError("stalled")


class StallingReader(PromptReader):
    def _dataset(self, start: int, stop: int) -> Any:
        return StallingRun(range(start, stop))


@pytest.mark.usefixtures("local_ray")
def test_an_execution_that_stalled_in_the_middle_is_begun_anew_where_it_was(tokenizer_path: str) -> None:
    tokenizer = SharedTokenizer(tokenizer_path, trust_remote_code=False)
    order = PromptOrder(10, seed=0, shuffle=False)
    stalling = StallingReader(table=RowTable([], []), order=order, builder=BUILDER, tokenizer=tokenizer, stop=13)
    assert [prompt.prompt_id for prompt in read(stalling, 3, 13)] == list(range(3, 13))
