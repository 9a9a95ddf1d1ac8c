"""Around the loop: writes which model families work, ``docs/models.md``, from what the tests of families know.

Run ``python docs/models_table.py`` after a change of it; tests compare the page with it, and it with what happens.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from rlhf_ray.errors import ConfigError
from rlhf_ray.models.config import check_causal
from rlhf_ray.rollouts.engine_spec import check_served

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from model_families import APART_BY_VARLEN, NOT_TRIED, UNKNOWN, WORKING, causal_families, tiny_config

INTRODUCTION = """\
# Models

Written by `docs/models_table.py` from the data of `tests/model_families.py` and the families that
`rlhf_ray/rollouts/engine_spec.py` refuses; edit those, not this page.

The policy is any causal language model that transformers can load and vLLM can run. The critic (`model.critic_path`,
or the policy's weights with a new value head) is the family's class for token classification where transformers has
one; elsewhere the same head, a linear layer that starts at zero, on the backbone that `AutoModel` gives. What a family
does to its logits, such as soft caps and scales, is not done to values. An export holds the critic in `critic/`, under
the names of its backbone and `score.weight`, `score.bias`; as `model.critic_path` it comes back bit for bit. A
checkpoint with a head of another name, or a classification model without one, is an error, never a new head.

A family is listed under its `model_type` in `config.json`. **PPO** says what became of two iterations of a tiny model
in float32 on CPUs, with real engines and learners (vLLM 0.32, transformers 5.19): "works" means that log-probabilities
of the engine and the learner differ by less than 1e-3 before and after a publication, and that policy and critic got
gradients. A family that does not work is refused by a `ConfigError` that says why, before anything starts; one that is
marked "CPUs" only where engines run on CPUs. "Unknown" is not refused: the tiny model could not be run, which may be
the fault of how it was made. **Packed** says whether the attention that learners on GPUs pack rows with
([packed rows](clusters.md#packed-rows)) gives, on CPUs, what separate sequences give; rows of other families are
padded. Nothing here was run on GPUs.
"""


def models_page() -> str:
    """Return the whole page."""
    others = ", ".join(f"`{family}`" for family in NOT_TRIED)
    end = f"\nFamilies that no tiny model was made of, so that nothing is known: {others}.\n"
    return INTRODUCTION + "\n| family | critic | packed | PPO |\n|---|---|---|---|\n" + "\n".join(rows()) + "\n" + end


def rows() -> Iterator[str]:
    """Yield a table row per family."""
    for family in causal_families():
        if family not in NOT_TRIED:
            packed = "yes" if family in APART_BY_VARLEN else "no"
            yield f"| `{family}` | {critic(family)} | {packed} | {outcome(family)} |"


def critic(family: str) -> str:
    """Say what the critic is made of."""
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    config = tiny_config(family)
    causal = AutoModelForCausalLM._model_mapping[type(config)]
    if config.sub_configs.get("text_config") is getattr(causal, "config_class", None):
        config = config.get_text_config()
    return "own class" if type(config) in AutoModelForTokenClassification._model_mapping else "`AutoModel` and head"


def outcome(family: str) -> str:
    """Say whether PPO works, or the reason for which the family is refused."""
    try:
        config = tiny_config(family)
        check_causal("", "", config)
        check_served("", config, on_cpus=False)
        check_served("", config, on_cpus=True)
    except ConfigError as error:
        where = "CPUs: " if "resources.device" in error.remedy else ""
        reason = error.remedy.partition("do not work: ")[2] or error.remedy
        return f"refused: {where}{reason.rpartition('; ')[0]}"
    return "works" if family in WORKING else f"unknown: {UNKNOWN[family]}"


if __name__ == "__main__":
    (Path(__file__).parent / "models.md").write_text(models_page())
