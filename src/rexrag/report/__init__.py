"""Run folders to one self-contained page. Reads what is on disk only; nothing here needs torch."""

from rexrag.report.page import write_report
from rexrag.report.read import Run, read_run

__all__ = ["Run", "read_run", "write_report"]
