"""Rewards, from a sequence-classification model: it has actors of its own, however many reward workers a run has.

::

    reward.py    what is asked for: the settings of a reward model
    check.py     what is wrong with it, before anything starts
    texts.py     prompt and completion -> the text that it reads
    padding.py   sequences of many lengths -> batches
    model.py     texts -> scores, in one process
    worker.py    the same in a Ray actor: rollout groups -> scores
    requests.py  the groups that wait for an actor
    pool.py      the actors of one reward model
"""
