"""Export of drafters to the checkpoint formats of serving engines."""

from vsd.export.card import REPORT, model_card
from vsd.export.checkpoint import FORMATS, check_new, export_drafter, serve_line

__all__ = ["FORMATS", "REPORT", "check_new", "export_drafter", "model_card", "serve_line"]
