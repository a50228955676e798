"""Drafters: small models that propose continuations. `base` is their role, a folder is a family."""

from vsd.drafters.base import Drafter, FeatureSpec
from vsd.drafters.load import FAMILIES, load_drafter, new_drafter
from vsd.drafters.vocabulary import DraftVocabulary, draft_vocabulary, most_frequent, of_label

__all__ = [
    "FAMILIES",
    "DraftVocabulary",
    "Drafter",
    "FeatureSpec",
    "draft_vocabulary",
    "load_drafter",
    "most_frequent",
    "new_drafter",
    "of_label",
]
