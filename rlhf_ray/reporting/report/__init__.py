"""Run directories as one HTML page that needs no other file, of finished runs or runs under way.

::

    run directories -- run.py -----.
                       charts.py --+--> writing.py --> page.py --> report.html
      conversation.py, tables.py --'                      ^
                                               assets/ --'
"""

from __future__ import annotations

from rlhf_ray.reporting.report.writing import DEFAULT_TABLES, write_report

__all__ = ["DEFAULT_TABLES", "write_report"]
