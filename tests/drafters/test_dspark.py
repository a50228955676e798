"""The DSpark drafter: its Markov bias and its confidence against plain formulas, and blocks that end early."""

from pathlib import Path
from typing import Any

import plain
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import along
import tiny_run
from vsd.decoding import Engine, Result, Sampling
from vsd.drafters import draft_vocabulary
from vsd.drafters.dspark import DSparkDrafter
from vsd.paths import TreeShape
from vsd.targets import Target

K = 4
KINDS: list[dict[str, Any]] = [{}, {"confidence_head_with_markov": False}, {"enable_confidence_head": False}]


@pytest.fixture(params=KINDS, ids=str)
def drafter(request: pytest.FixtureRequest, tiny_target: Target) -> DSparkDrafter:
    torch.manual_seed(1)
    vocabulary = draft_vocabulary(torch.randint(tiny_target.vocab_size, (500,)), tiny_target.vocab_size, 40)
    options = {"num_hidden_layers": 2, "markov_rank": 8, **request.param}
    drafter = DSparkDrafter.for_target(tiny_target, vocabulary, **options)
    plain.randomised(drafter)
    return drafter.eval()


@torch.no_grad()
def test_bias_and_confidence_equal_the_textbook_in_training_and_decoding(
    tiny_target: Target, drafter: DSparkDrafter
) -> None:
    ids, entries = plain.inputs(tiny_target, drafter)
    path = torch.randint(128, (2, K), generator=torch.Generator().manual_seed(2))
    states, head = drafter(entries, along.paths(torch.tensor([[10], [10]]), path[:, None]), lambda *found: found)
    logits = drafter.confidence(states)
    state = drafter.begin_at(entries, torch.tensor([[10], [10]]), K)
    block = drafter.block(state, ids[:, 11], K)  # [2, K, h]
    law = drafter.conditionals(state, ids[:, 11], K)
    w = drafter.state_dict()
    for k in range(K):
        before = ids[:, 11] if k == 0 else path[:, k - 1]
        embedding = w["markov_head.markov_w1.weight"][before]
        wanted = block[:, k] @ w["lm_head.weight"].T + embedding @ w["markov_head.markov_w2.weight"].T
        torch.testing.assert_close((states[k, :, 0] @ head.T), wanted, rtol=1e-4, atol=1e-4)
        found = law(k, before[:, None], torch.zeros(2, 1, dtype=torch.long))
        torch.testing.assert_close(found.log_q[:, 0], wanted.log_softmax(-1), rtol=1e-4, atol=1e-4)
        if drafter.confidence_head is None:
            assert logits is None and found.log_c is None
            continue
        seen = block[:, k]
        if drafter.config.confidence_head_with_markov:
            seen = torch.cat([seen, embedding], -1)
        c = seen @ w["confidence_head.proj.weight"][0] + w["confidence_head.proj.bias"]
        torch.testing.assert_close(logits[k, :, 0], c, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.log_c[:, 0], F.logsigmoid(c), rtol=1e-4, atol=1e-4)


def test_saved_and_loaded_bit_for_bit(drafter: DSparkDrafter, tiny_target: Target, tmp_path: Path) -> None:
    fields = ("sample_from_anchor", "markov_rank", "enable_confidence_head", "confidence_head_with_markov")
    plain.check_saved(tiny_target, drafter, tmp_path, fields)


# ---- blocks that end early


@pytest.fixture(scope="module")
def fluent(tiny_target: Target, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Any]]:
    """A drafter after training, and the prompts of its text."""
    examples = tiny_run.tiny_examples(tiny_target, 16, 24)
    options = {"learning_rate": 1e-2, "num_train_epochs": 25, "family": "dspark"}
    trainer = tiny_run.tiny_trainer(tiny_target, examples, tmp_path_factory.mktemp("run"), **options)
    trainer.train()
    return trainer.model.eval().requires_grad_(False), [tiny_run.prompt_of(example) for example in examples]


@pytest.fixture(scope="module")
def plainly(tiny_target: Target, fluent: tuple[Any, list[Any]]) -> list[list[int]]:
    """The answers without a drafter."""
    return [result.tokens for result in answers(tiny_target, fluent, None)]


def answers(target: Target, pair: tuple[Any, list[Any]], shape: TreeShape | None) -> list[Result]:
    """To one prompt at a time: a batch ends its blocks together."""
    engine = Engine(target, pair[0] if shape else None, shape)
    return [engine.generate([prompt], Sampling(30, eos_ids=()))[0] for prompt in pair[1]]


@pytest.mark.parametrize("shape", [TreeShape(3, 1, 4, 0.5), TreeShape(3, 3, 8, 0.3)], ids=str)
def test_ending_early_changes_the_cost_and_not_the_output(
    tiny_target: Target, fluent: tuple[Any, list[Any]], plainly: list[list[int]], shape: TreeShape
) -> None:
    """Beyond the text that it was trained on the drafter is often wrong, and knows it."""
    whole = answers(tiny_target, fluent, TreeShape(shape.depth, shape.top_k, shape.nodes))
    early = answers(tiny_target, fluent, shape)
    assert all([result.tokens for result in results] == plainly for results in (whole, early))
    verified = [sum(nodes for result in results for nodes, _ in result.trees) for results in (whole, early)]
    accepted = [sum(sum(result.accepted) for result in results) for results in (whole, early)]
    passes = [sum(len(result.trees) for result in results) for results in (whole, early)]
    assert verified[1] < 0.9 * verified[0]
    assert accepted[1] / (verified[1] - passes[1]) > 1.1 * accepted[0] / (verified[0] - passes[0])


@torch.no_grad()
def test_a_chain_ends_where_the_product_of_confidences_falls_below(
    tiny_target: Target, fluent: tuple[Any, list[Any]]
) -> None:
    """Row by row, proposed and drawn, against the confidences themselves."""
    drafter = fluent[0]
    for seed in range(6):
        ids = torch.randint(15, 128, (1, 10), generator=torch.Generator().manual_seed(seed))
        entries = along.entries(tiny_target, ids, drafter.needs.layers)._replace(next_ids=ids.roll(-1, 1))
        state, root = drafter.begin_at(entries, torch.tensor([[8]]), 8), ids[:, 9]
        law, product, lengths, token = drafter.conditionals(state, root, 3), 1.0, [], root
        for k in range(3):
            found = law(k, token[:, None], torch.zeros_like(root)[:, None])
            product *= float(found.log_c.exp())
            lengths.append(product)
            token = drafter.vocabulary.ids[found.log_q[:, 0].argmax(-1)]
        for p_min in (0.8, 0.4, 0.1):
            wanted = sum(c >= p_min for c in lengths)
            shape = TreeShape(3, 1, 4, p_min)
            assert drafter.propose(state, root, shape).tokens.shape[1] == 1 + wanted
            chain = drafter.draw(state, root, shape, [0.0], [None])
            assert chain.tree.tokens.shape[1] == 1 + max(1, wanted) == 1 + chain.draft_logp.shape[1]


def test_a_node_shares_what_the_best_child_leaves(tiny_target: Target, fluent: tuple[Any, list[Any]]) -> None:
    """With p_min the probabilities of a node's children sum to at most one, and the best child has the confidence."""
    drafter = fluent[0]
    ids = torch.randint(15, 128, (2, 10), generator=torch.Generator().manual_seed(3))
    entries = along.entries(tiny_target, ids, drafter.needs.layers)._replace(next_ids=ids.roll(-1, 1))
    root = ids[:, 9]
    for row in range(2):
        one = entries._replace(**{n: x[row : row + 1] for n, x in entries._asdict().items() if isinstance(x, Tensor)})
        state = drafter.begin_at(one, torch.tensor([[8]]), 300)
        found = drafter.conditionals(state, root[row : row + 1], 1)(0, root[row : row + 1, None], torch.zeros(1, 1))
        c, q = float(found.log_c.exp()), found.log_q[0, 0].exp()
        whole = drafter.propose(state, root[row : row + 1], TreeShape(1, 64, 65, 1e-30))
        scores = whole.log_q[0, 1:].exp()
        assert float(scores.sum()) == pytest.approx(1.0, abs=1e-4)
        best = drafter.vocabulary.ids[q.argmax()]
        assert float(scores[whole.tokens[0, 1:] == best]) == pytest.approx(c, abs=1e-5)
