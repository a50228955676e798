"""A plain small causal LM with the target's tokenizer: a draft model for vLLM, an assistant for transformers."""

from vsd.drafters.lm.family import FAMILY
from vsd.drafters.lm.model import LMDrafter, LMState

__all__ = ["FAMILY", "LMDrafter", "LMState"]
