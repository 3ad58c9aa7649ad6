"""The report: one HTML file with everything about every cell, or a static site with a page per block."""

from dfqbench.analysis.report.report import default_title, write_report
from dfqbench.analysis.report.site import INDEX, write_site

__all__ = ["INDEX", "default_title", "write_report", "write_site"]
