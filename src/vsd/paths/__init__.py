"""Draft trees and paths: their topology, and the target along them."""

from vsd.paths.continued import Continuations, along, check_length, continue_text, extended
from vsd.paths.entries import Entries, rows_at
from vsd.paths.recorded import Paths, cut, longest_first, recorded
from vsd.paths.scored import Scored, score_paths
from vsd.paths.tree import NO_TOKEN, Chain, Tree, TreeShape, ancestors, best_nodes, graft, leaf_paths

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
    "best_nodes",
    "check_length",
    "continue_text",
    "cut",
    "extended",
    "graft",
    "leaf_paths",
    "longest_first",
    "recorded",
    "rows_at",
    "score_paths",
]
