"""The embedded quickstart: the model and the task that a run without a model path and a data path uses.

``model/`` holds the weights and the tokenizer, ``make_model.py`` made them, ``task.py`` is the data and the reward.
"""

from __future__ import annotations

from importlib.resources import files

__all__ = ["model_path"]


def model_path() -> str:
    """Return the folder of the embedded model, weights and tokenizer, as transformers and vLLM load it."""
    return str(files(__name__) / "model")
