"""``python -m rlhf_ray.cli`` is the ``rlhf-ray`` command."""

from __future__ import annotations

import sys

from rlhf_ray.cli import main

sys.exit(main())
