"""Rewards from a sequence-classification model, which has actors of its own, however many reward workers a run has.

::

    reward.py  the settings of a reward model
    check.py   what is wrong with them, found before anything starts
    model.py   prompts and completions -> scores, in one process
"""
