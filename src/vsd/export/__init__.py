"""Drafters in the formats that engines serve, and back."""

from vsd.export.card import model_card
from vsd.export.checkpoint import FORMATS, export_drafter, import_drafter, serve_line

__all__ = ["FORMATS", "export_drafter", "import_drafter", "model_card", "serve_line"]
