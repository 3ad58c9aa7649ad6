"""The report: one HTML file with everything about every cell."""

from dfqbench.analysis.report.report import default_title, write_report

__all__ = ["default_title", "write_report"]
