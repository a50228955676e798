"""Where a token is taken from logits."""

import torch

from goodness import p_value
from vsd.targets.sampling import choose


def test_chosen_tokens_have_the_softmaxs_law() -> None:
    """χ² of 20,000 draws of 9 tokens, false alarm 1e-4, fixed seed; two of the tokens are impossible."""
    logits = torch.tensor([-torch.inf, 0.3, 2.0, -1.5, -torch.inf, 0.0, 1.0, 0.7, -0.2])
    generator = torch.Generator().manual_seed(0)
    drawn = choose(logits.expand(100, 200, -1), 0.7, generator)
    assert drawn.shape == (100, 200)
    counts = torch.bincount(drawn.flatten(), minlength=9)
    assert not counts[logits.isinf()].any()
    assert p_value(counts, (logits.double() / 0.7).softmax(-1)) > 1e-4
    assert torch.equal(choose(logits.expand(3, -1), 0, None), torch.tensor([2, 2, 2]))
