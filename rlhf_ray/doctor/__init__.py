"""``rlhf-ray doctor`` checks, before a run, what it needs: packages, machine, Ray, models, data, memory and an engine.

``examination.py`` calls the checks of the other modules, in order.
"""

from __future__ import annotations
