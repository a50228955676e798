"""Decoding as the E-step: training on answers that are given during the training (`vsd train --online`)."""

from vsd.training.online.prompts import load_prompts
from vsd.training.online.rollouts import Rollout, roll_out
from vsd.training.online.source import OnlineOrder, OnlineText

__all__ = ["OnlineOrder", "OnlineText", "Rollout", "load_prompts", "roll_out"]
