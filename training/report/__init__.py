"""RUN/report.html: a run's curves, what they say, and its pictures, in one self-contained page."""

from training.report.page import REPORT, refresh, write_report

__all__ = ["REPORT", "refresh", "write_report"]
