"""Verification of a batch: every row by the law of its own request, and by the rule that fits its draft.

Penalties, biases and grammars read the whole text before a token: at a node of the tree that is prompt, answer and the
path from the root to the node. The walk asks for tokens only at the nodes that it visits. A processor is therefore
called with exactly the histories, in exactly the order, of plain decoding: the output has plain decoding's law for any
processor, also for one that keeps a state from token to token, and no other node is processed.

Legend: B batch, N nodes, R rows still walking, V vocabulary, K drafted tokens of a chain.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vsd.errors import ConfigurationError, TargetError
from vsd.paths import Chain, Tree
from vsd.targets.sampling import Generators, draw, probabilities
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
    """The nodes that the target accepts, and the token that it adds.

    Args:
        tree: the draft.
        logits: the target's at every node, [B, N, V].
        laws: of the B rows.
        history: prompt and answer of row b, root included.
        chain: the same draft as a sampled chain, verified by rejection; None: rules `greedy` and `target`.

    Raises:
        TargetError: NaN or infinite logits.
        ConfigurationError: a processor leaves no token.
    """
    best, choice = logits.max(-1)
    if not bool(best.isfinite().all()):
        raise TargetError(
            "the target computes NaN or infinity: load it in another precision (dtype), or repair its weights"
        )
    if all(law.plain for law in laws):
        return follow(tree, choice)
    decided: list[list[int]] = [[] for _ in laws]  # tokens of this pass, by row

    def choose(rows: Tensor, nodes: Tensor) -> Tensor:
        walking = rows.tolist()
        scores = _processed(logits[rows, nodes], walking, laws, decided, history)
        generators = [laws[b].generator for b in walking]
        node = int(nodes[0])  # in a chain all walking rows are at the same node
        tokens = _tokens(probabilities(scores, generators), generators, tree.tokens[rows], chain, rows, node)
        for b, token in zip(walking, tokens.tolist()):
            decided[b].append(token)
        return tokens

    return walk(tree, choose)


def _processed(
    scores: Tensor,
    walking: list[int],
    laws: Sequence[Law],
    decided: list[list[int]],
    history: Callable[[int], list[int]],
) -> Tensor:
    """Scores [R, V] of the walking rows, each processed by the law of its row."""
    for r, b in enumerate(walking):
        scores[r : r + 1] = _process_row(scores[r : r + 1], b, laws[b], decided[b], history)
    if not bool(scores.amax(-1).isfinite().all()):
        raise ConfigurationError(
            "the logits processors leave no token to choose (all scores are -inf, or one is NaN): change the processors"
        )
    return scores


def _process_row(scores: Tensor, row: int, law: Law, decided: list[int], history: Callable[[int], list[int]]) -> Tensor:
    """Scores [1, V]; unchanged after an end token, where the answer is cut off."""
    if not law.processors or law.eos.intersection(decided[-1:]):
        return scores
    return law.process(lambda: history(row) + decided, scores)


def _tokens(p: Tensor, generators: Generators, drafted: Tensor, chain: Chain | None, rows: Tensor, node: int) -> Tensor:
    """Tokens [R] of law p [R, V]; before the end of a chain they are coupled with its next tokens, drafted [R, N]."""
    if chain is None or node == chain.draft_logp.shape[1]:
        return draw(p, generators)
    q = torch.zeros_like(p).index_copy_(-1, chain.ids, chain.draft_logp[rows, node].exp())
    return couple(p, q, drafted[:, node + 1], generators)
