"""Drafters: small models that propose paths from the target's features."""

from vsd.drafters.eagle3 import DraftCache, Eagle3Config, Eagle3Drafter
from vsd.drafters.load import load_drafter
from vsd.drafters.vocabulary import draft_vocabulary, of_label

__all__ = ["DraftCache", "Eagle3Config", "Eagle3Drafter", "draft_vocabulary", "load_drafter", "of_label"]
