"""The same run on this machine, on a running Ray cluster, or as a Slurm job.

::

    rlhf-ray launch local|ray|slurm SCRIPT_OR_CONF [--config FILE] [section.field=value ...]

``python -m rlhf_ray.launchers.local``, ``.ray`` and ``.slurm`` are the same commands. What is launched is a
:class:`~rlhf_ray.launchers.program.Program`; each backend decides only where its command line runs.
"""

from __future__ import annotations
