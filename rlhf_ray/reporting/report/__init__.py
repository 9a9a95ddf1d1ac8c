"""After the last iteration, or on the way: run directories as one HTML page that needs nothing but itself.

::

    run directories -- run.py ----------.
                       curves.py        |
                       tables.py -------+--> contents.py --> page.py --> report.html
                       settings.py -----'                       ^
                       charts.py -------'             assets/ --'
"""

from __future__ import annotations

from rlhf_ray.reporting.report.writing import DEFAULT_TABLES, write_report

__all__ = ["DEFAULT_TABLES", "write_report"]
