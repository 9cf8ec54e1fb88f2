"""One page of HTML about a run, or about several beside each other, that needs no server.

``run_record`` reads a run's folder, ``series`` brings long curves to a bounded number of points,
``line_chart`` draws them as SVG, and ``report_page`` puts everything into one file.
"""

from __future__ import annotations

from fastdiff.training.run_report.report_page import page
from fastdiff.training.run_report.report_writer import REPORT, ReportWriter, write
from fastdiff.training.run_report.run_record import RunRecord

__all__ = ["REPORT", "ReportWriter", "RunRecord", "page", "write"]
