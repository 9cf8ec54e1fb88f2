"""``fastdiff.accelerate``: a pipeline of diffusers, or a model, made fast in place.

pipelines.py        accelerate, restore and report: what is called
components.py       what a pipeline consists of, and which parts of it are compiled
obstacles.py        why a part is left as it is
compiled_parts.py   compiles a module in place, and undoes it
scheduler_swap.py   puts fastdiff's scheduler in the place of diffusers' and back
acceleration_report.py   the table that says what was done
"""

from fastdiff.acceleration.acceleration_report import Report, Row
from fastdiff.acceleration.pipelines import accelerate, report, restore

__all__ = ["Report", "Row", "accelerate", "report", "restore"]
