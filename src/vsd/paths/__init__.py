"""Draft paths and trees: their topology, and how they are drawn from a drafter."""

from vsd.paths.tree import Chain, Tree, TreeShape, ancestors, draw_chain, draw_tree

__all__ = ["Chain", "Tree", "TreeShape", "ancestors", "draw_chain", "draw_tree"]
