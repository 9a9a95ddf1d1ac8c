"""The policy measured on held-out prompts, by the same replicas and rewards as in training.

::

    pass_at_k.py        the estimator, as a pure function
    metrics.py          scored groups of one set -> its metrics
    evaluator.py        when a run measures itself, and how
    command_line.py     what rlhf-ray evaluate measures
"""
