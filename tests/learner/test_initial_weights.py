"""Models that one rank reads: equal to those that a process reads by itself, in memory for one model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import loading_ranks
import pytest
import torch
from model_families import NOT_TRIED, causal_families, tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

import rlhf_ray

# Tied and not, experts that memory joins, a language model within another one, buffers that are stored.
IN_EVERY_RUN = ("qwen2", "gpt2", "glm4_moe", "gemma4_text")
OTHERS = [family for family in causal_families() if family not in (*NOT_TRIED, *IN_EVERY_RUN)]
MIB = 2**20

Results = list[dict[str, Any]]


def save_family(family: str, folder: Path, **changed: Any) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(family, **changed)).save_pretrained(folder / "policy")


def on_ranks(folder: Path, cases: dict[str, Any], *, world_size: int) -> Results:
    """What each rank found of the cases."""
    (folder / "cases.json").write_text(json.dumps(cases))
    (folder / "store").unlink(missing_ok=True)
    paths = (Path(rlhf_ray.__file__).parents[1], Path(loading_ranks.__file__).parent)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}
    logs = [folder / f"rank{rank}.log" for rank in range(world_size)]
    started = []
    with ExitStack() as stack:
        for rank, log in enumerate(logs):
            command = [sys.executable, loading_ranks.__file__, str(folder), str(rank), str(world_size)]
            output = stack.enter_context(log.open("w"))
            started.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
            stack.callback(started[-1].kill)
        ends = [process.wait(timeout=1500) for process in started]
    assert ends == [0] * world_size, "\n".join(log.read_text() for log in logs)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world_size)]


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Callable[[int], Results]:
    """Learners of all kinds of checkpoints, on so many ranks."""
    folder = tmp_path_factory.mktemp("loading")
    cases: dict[str, Any] = {}
    for family in IN_EVERY_RUN:
        save_family(family, folder / family)
        cases[family] = {"folder": family, "critic": "policy"}
    save_family("qwen2", folder / "tied", tie_word_embeddings=True)
    (folder / "trained").symlink_to(models)
    file = folder / "tied" / "policy" / "model.safetensors"
    weights = load_file(file)
    # Older files have a tied weight under both its names.
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    save_family("qwen3_moe", folder / "bin")
    file = folder / "bin" / "policy" / "model.safetensors"
    weights = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    torch.save(weights, file.with_name("pytorch_model.bin"))
    file.unlink()
    cases |= {
        "tied in the file": {"folder": "tied", "critic": "policy"},
        "not safetensors": {"folder": "bin", "critic": "policy"},
        "memory in another order": {"transposed": True},
        "adapters": {"folder": "qwen2", "lora": True},
        "a trained critic": {"folder": "trained", "critic": "critic"},
        "bfloat16": {"folder": "qwen2", "critic": "policy", "spec": {"dtype": "bfloat16"}},
        "offloaded": {
            "folder": "gpt2",
            "critic": "policy",
            "spec": {"offload_reference": True, "offload_optimizer": True},
        },
    }
    return lambda world_size: on_ranks(folder, cases, world_size=world_size)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_shards_are_those_of_whole_models(several: Callable[[int], Results], world_size: int) -> None:
    assert [found for rank in several(world_size) for found in rank.items() if found[1]] == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_shards_of_every_family_are_those_of_whole_models(tmp_path: Path) -> None:
    for family in OTHERS:
        save_family(family, tmp_path / family)
    cases = {family: {"folder": family, "critic": "policy"} for family in OTHERS}
    assert [found for rank in on_ranks(tmp_path, cases, world_size=2) for found in rank.items() if found[1]] == []


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_ranks_hold_one_model_at_their_highest(tmp_path: Path, world_size: int) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8}
    # Of 12 layers, and of one parameter.
    for name, layers, vocabulary in (("tiny", 1, 64), ("wide", 1, 90_001), ("whole", 12, 64)):
        config = Qwen2Config(vocab_size=vocabulary, num_hidden_layers=layers, tie_word_embeddings=True, **sizes)
        model = Qwen2ForCausalLM(config)
        # In half precision, so that the reader has to convert it: weights that are as in the file are the file's.
        model.bfloat16().save_pretrained(tmp_path / name / "policy")
        size = 4 * model.num_parameters()
        assert name == "tiny" or 185 * MIB < size < 210 * MIB

    # The first one imports what all of them need.
    cases = {name: {"folder": name, "measured": True} for name in ("tiny", "whole", "wide")}
    found = on_ranks(tmp_path, cases, world_size=world_size)
    reader, *others = (rank["whole"] for rank in found)

    assert reader < size + 32 * MIB
    assert all(grew < size / world_size + 32 * MIB for grew in others)
    # Rows of one parameter come in messages of 64 MiB: no rank has a second copy of a whole shard.
    reader, *others = (rank["wide"] for rank in found)
    assert reader < size + size / world_size + 32 * MIB
    assert all(grew < size / world_size + 96 * MIB for grew in others)
