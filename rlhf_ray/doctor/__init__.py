"""Before a run: ``rlhf-ray doctor`` looks for what would go wrong, and says what to do about it.

``examination.py`` runs the checks of the other modules; it is not imported here, because the processes that some checks
start import this package too and have no use for the rest.
"""

from __future__ import annotations

from rlhf_ray.doctor.check import Check

__all__ = ["Check"]
