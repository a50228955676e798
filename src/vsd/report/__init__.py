"""A page about runs that a browser shows without a network: curves, acceptance, speed, answers, settings, commands."""

from vsd.report.page import write_report
from vsd.report.read import runs_of

__all__ = ["runs_of", "write_report"]
