"""Verification of a batch: every row by the law of its own request, and by the rule its draft was made for.

Penalties, biases and grammars look at the whole text before a token, so at a node of the tree they must see prompt,
answer and the path from the root to the node. The walk asks for tokens only at the nodes it comes by. A processor is
therefore called with exactly the histories, one after another, with which plain decoding calls it: the output's law is
plain decoding's whatever it computes, also if it keeps a state from token to token, and no node is processed in vain.

Legend: B batch, N nodes, R rows still walking, V vocabulary, K drafted tokens of a chain.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vsd.errors import VSDError
from vsd.paths import Chain, Tree
from vsd.targets.sampling import draw, probabilities
from vsd.verification.law import Law
from vsd.verification.rejection import couple
from vsd.verification.walk import Verdict, follow, walk


def verify(
    tree: Tree,
    logits: Tensor,
    laws: Sequence[Law],
    history: Callable[[int], list[int]],
    chain: Chain | None = None,
) -> Verdict:
    """What the target accepts, and the token it adds.

    Args:
        tree: what was drafted.
        logits: the target's at every node, [B, N, V].
        laws: of the B rows.
        history: prompt and answer of row b, the root included.
        chain: the tree, if it was sampled: it is then verified by rejection.

    Raises:
        VSDError: there are NaN or infinite logits, or a processor leaves no token.
    """
    best, choice = logits.max(-1)
    if not bool(best.isfinite().all()):
        raise VSDError("the target computes NaN or infinity: its weights, or its precision, are broken")
    if all(law.plain for law in laws):
        return follow(tree, choice)
    decided: list[list[int]] = [[] for _ in laws]

    def choose(rows: Tensor, nodes: Tensor) -> Tensor:
        walking = rows.tolist()
        scores = logits[rows, nodes]  # [R, V]
        for r, b in enumerate(walking):
            if laws[b].processors and not laws[b].eos.intersection(decided[b][-1:]):
                scores[r : r + 1] = laws[b].process(lambda b=b: history(b) + decided[b], scores[r : r + 1])
        if not bool(scores.amax(-1).isfinite().all()):
            raise VSDError("the logits processors leave no token to choose: all are -inf, or one is NaN")
        generators = [laws[b].generator for b in walking]
        p = probabilities(scores, generators)
        k = int(nodes[0])  # in a chain, all that walk are at the same node
        if chain is None or k == chain.draft_logp.shape[1]:
            tokens = draw(p, generators)
        else:
            q = torch.zeros_like(p).index_copy_(-1, chain.ids, chain.draft_logp[rows, k].exp())
            tokens = couple(p, q, tree.tokens[rows, k + 1], generators)
        for b, token in zip(walking, tokens.tolist()):
            decided[b].append(token)
        return tokens

    return walk(tree, choose)
