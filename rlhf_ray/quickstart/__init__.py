"""The embedded quickstart: the models and the tasks that a run without a model path and a data path uses.

``model/`` holds the weights and the tokenizer for sums of two numbers, of which ``task.py`` is the data and the reward.
``calculator_model/`` holds those for the multi-turn quickstart, of which ``calculator.py`` is the data and the
environment. ``make_model.py`` made both.
"""

from __future__ import annotations

from importlib.resources import files

__all__ = ["calculator_model_path", "model_path"]


def model_path() -> str:
    """Return the folder of the embedded model, weights and tokenizer, as transformers and vLLM load it."""
    return str(files(__name__) / "model")


def calculator_model_path() -> str:
    """Return the folder of the model for the calculator environment, as :func:`model_path` does."""
    return str(files(__name__) / "calculator_model")
