"""Draft paths and trees: their topology, and where they come from: the text, the target, or a drafter."""

from vsd.paths.continued import Continuations, Entries, along, beside, check_length, continue_text
from vsd.paths.drafted import Scored, draw_paths, draw_trees, score_paths
from vsd.paths.recorded import Paths, consumed, cut, longest_first, recorded, widths
from vsd.paths.tree import NO_TOKEN, Chain, Tree, TreeShape, ancestors, draw_chain, draw_tree, graft

__all__ = [
    "NO_TOKEN",
    "Chain",
    "Continuations",
    "Entries",
    "Paths",
    "Scored",
    "Tree",
    "TreeShape",
    "along",
    "ancestors",
    "beside",
    "check_length",
    "consumed",
    "continue_text",
    "cut",
    "draw_chain",
    "draw_paths",
    "draw_tree",
    "draw_trees",
    "graft",
    "longest_first",
    "recorded",
    "score_paths",
    "widths",
]
