"""Generates the table of docs/clusters.md: models that fit on given GPUs, computed as by ``rlhf-ray doctor``.

Run ``python docs/memory_table.py`` after a change of rlhf_ray/doctor/memory.py; a test compares the two.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_ray import PPOConfig
from rlhf_ray.doctor.memory import RESIDUE_BYTES, MemoryNeed, ModelFacts

PAGE = Path(__file__).parent / "clusters.md"
BEGIN, END = "<!-- memory table, by docs/memory_table.py -->\n", "<!-- end of the table -->\n"

# The shapes of Qwen2.5.
SHAPES: dict[str, dict[str, Any]] = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
    "32B": {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40},
}
KEY_VALUE_HEADS = {"0.5B": 2, "1.5B": 2, "7B": 4, "32B": 8}
TIED = ("0.5B", "1.5B")


class Case(NamedTuple):
    """A row of the table."""

    model: str
    gpus: str
    settings: dict[str, Any]
    per_node: int = 8
    """GPUs per node that the run uses."""

    @property
    def colocated(self) -> bool:
        """Whether each replica shares its GPU with a learner."""
        return bool(self.settings.get("resources.colocate", False))


SHARED = {"resources.colocate": True}
CASES = (
    Case(model="0.5B", gpus="1 x 24 GB", settings=SHARED | {"learners.max_tokens_per_microbatch": 4096}, per_node=1),
    Case(model="0.5B", gpus="2 x 24 GB", settings={"learners.max_tokens_per_microbatch": 4096}, per_node=2),
    Case(model="1.5B", gpus="1 x 80 GB", settings=SHARED, per_node=1),
    Case(model="1.5B", gpus="2 x 80 GB", settings={}, per_node=2),
    Case(
        model="7B",
        gpus="4 x 141 GB",
        settings=SHARED | {"learners.num_learners": 4, "rollouts.num_replicas": 4},
        per_node=4,
    ),
    Case(model="7B", gpus="8 x 80 GB", settings=SHARED | {"learners.num_learners": 8, "rollouts.num_replicas": 8}),
    Case(model="7B", gpus="2 x 8 x 80 GB", settings={"learners.num_learners": 8, "rollouts.num_replicas": 8}),
    Case(
        model="32B",
        gpus="4 x 8 x 80 GB",
        settings={
            "learners.num_learners": 24,
            "rollouts.num_replicas": 4,
            "rollouts.tensor_parallel_size": 2,
            "fault_tolerance.state_interval": 4,
        },
    ),
    Case(
        model="32B",
        gpus="2 x 8 x 141 GB",
        settings=SHARED
        | {"learners.num_learners": 16, "rollouts.num_replicas": 16, "fault_tolerance.state_interval": 0},
    ),
)


@cache
def facts(name: str) -> ModelFacts:
    """A model of the table; its weights are never allocated."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    heads = KEY_VALUE_HEADS[name]
    config = Qwen2Config(
        **SHAPES[name],
        vocab_size=151936 if name in TIED else 152064,
        num_key_value_heads=heads,
        max_position_embeddings=32768,
        tie_word_embeddings=name in TIED,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return ModelFacts(name, sum(parameter.numel() for parameter in model.parameters()), config)


def need_of(case: Case) -> MemoryNeed:
    """Memory of PPO with a critic and without a reference, for prompts of 512 tokens and completions of 2,048."""
    settings = PPOConfig.from_dict({"model.path": case.model} | case.settings).settings
    model = facts(case.model)
    return MemoryNeed.of(settings, model, model, dtype_bytes=2, max_tokens=2560)


def host_bytes(case: Case, need: MemoryNeed) -> int:
    """CPU memory of a node: copies for restarts, and models that are off the GPU while another process uses it."""
    learners = min(case.settings.get("learners.num_learners", 1), case.per_node)
    replicas = min(case.settings.get("rollouts.num_replicas", 1), case.per_node)
    asleep = learners * need.away + replicas * need.engine_weights
    return learners * need.copies + asleep * case.colocated


def table() -> str:
    """The table, in Markdown."""
    lines = [
        "| model | GPUs | settings | GPU memory of a learner | of an engine | CPU memory of a node | run? |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        need = need_of(case)
        settings = "<br>".join(f"`{name}={_value(value)}`" for name, value in case.settings.items()) or "the defaults"
        learner = f"{_gb(need.learner)} + about {_gb(need.working)}"
        left = f", {_gb(RESIDUE_BYTES)} used by the other process" if case.colocated else ""
        engine = f"{_gb(need.engine_weights)} + {need.sequence / 1e6:.0f} MB per sequence{left}"
        host = _gb(host_bytes(case, need))
        lines.append(f"| {case.model} | {case.gpus} | {settings} | {learner} | {engine} | {host} | computed |")
    return "\n".join(lines) + "\n"


def _value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _gb(size: int) -> str:
    return f"{size / 1e9:,.0f} GB" if size >= 1e11 else f"{size / 1e9:.3g} GB"


def page(text: str) -> str:
    """The page with its table replaced by the current one."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
