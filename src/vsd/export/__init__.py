"""Export of drafters to the checkpoint formats of serving engines."""

from vsd.export.card import model_card
from vsd.export.checkpoint import FORMATS, check_new, export_drafter, serve_line

__all__ = ["FORMATS", "check_new", "export_drafter", "model_card", "serve_line"]
