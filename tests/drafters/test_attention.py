"""Attention of drafters: outputs and gradients of the plain formula, without the scores of all queries in memory."""

from typing import Any

import pytest
import torch
from torch import Tensor

import along
from vsd import chunks
from vsd.drafters import draft_vocabulary, new_drafter
from vsd.drafters.attention import attend_block
from vsd.targets import Target

B, H, N, E, P, D = 2, 6, 2, 5, 4, 3
SCORES = B * H * E * 4  # bytes of one path's scores, with one query and no key of its own


def plain_block(
    queries: Tensor, shared: tuple[Tensor, Tensor], seen: Tensor, own: tuple[Tensor, Tensor], own_seen: Tensor
) -> Tensor:
    """The formula itself, with all keys of all paths side by side: [B, H, P J, E + P M]."""
    (J, M), paths, G = own_seen.shape, seen.shape[1], queries.shape[1] // shared[0].shape[1]
    keys, values = (torch.cat(pair, dim=2).repeat_interleave(G, 1) for pair in zip(shared, own))
    blocks = torch.block_diag(*[own_seen.float()] * paths).bool().view(paths * J, paths * M)
    allowed = torch.cat([seen.repeat_interleave(J, 1), blocks.expand(len(seen), -1, -1)], dim=-1)
    scores = queries @ keys.mT * queries.shape[-1] ** -0.5
    return scores.masked_fill(~allowed[:, None], float("-inf")).softmax(-1) @ values


def case(J: int, M: int, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """Queries, keys, values, own keys and own values; and both masks, by which every query sees something."""
    torch.manual_seed(J + 10 * M)
    sizes = (H, P * J), (N, E), (N, E), (N, P * M), (N, P * M)
    states = [torch.randn(B, heads, n, D, dtype=dtype, requires_grad=True) for heads, n in sizes]
    seen, own_seen = torch.rand(B, P, E) < 0.5, torch.rand(J, M) < 0.5
    seen[:, :, 0] = True
    return states, (seen, own_seen)


def attended(function: Any, states: list[Tensor], masks: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Output, and the gradients of a weighted sum of it."""
    queries, keys, values, own_keys, own_values = states
    out = function(queries, (keys, values), masks[0], (own_keys, own_values), masks[1])
    slope = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    return out.detach(), *torch.autograd.grad(out, states, slope)


@pytest.mark.parametrize("chunk", [1, 3 * SCORES, 1 << 20], ids=["path by path", "uneven", "at once"])
@pytest.mark.parametrize(("J", "M"), [(1, 0), (1, 3), (3, 3), (2, 1)])
def test_it_is_the_plain_formula(J: int, M: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunks._BYTES, "cpu", chunk)
    states, masks = case(J, M)
    wanted = attended(plain_block, states, masks)
    for found, exact in zip(attended(attend_block, states, masks), wanted):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        rough = [x.detach().to(dtype).requires_grad_() for x in states]
        for found, exact in zip(attended(attend_block, rough, masks), wanted):
            assert found.dtype == dtype
            torch.testing.assert_close(found.double(), exact, rtol=close, atol=close)


@pytest.mark.parametrize(("J", "M"), [(1, 0), (2, 3)])
def test_gradients_are_those_of_the_output(J: int, M: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunks._BYTES, "cpu", 3 * SCORES)
    states, (seen, own_seen) = case(J, M)
    seen[0, 2], seen[1, 0] = False, False  # these paths see no entry
    own_seen[:1] = False  # and this query nothing at all
    run = lambda q, k, v, ok, ov: attend_block(q, (k, v), seen, (ok, ov), own_seen)  # noqa: E731
    torch.autograd.gradcheck(run, states, fast_mode=True)  # along random directions


def test_numbers_in_place_of_the_mask_are_added_to_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """An added logarithm of a whole number n has the effect of n equal entries, and minus infinity hides an entry."""
    monkeypatch.setitem(chunks._BYTES, "cpu", 3 * SCORES)
    states, (seen, own_seen) = case(2, 3)
    own_seen[:, 0] = True
    added = torch.where(seen, 0.0, float("-inf")).double()
    for found, wanted in zip(*(attended(attend_block, states, (mask, own_seen)) for mask in (added, seen))):
        torch.testing.assert_close(found, wanted)
    added[:, :, 0] = torch.tensor(3.0).log()
    queries, keys, values, *own = states
    copied = [torch.cat([x, x[:, :, :1], x[:, :, :1]], dim=2) for x in (keys, values)]
    twice = seen[:, :, :1].expand(-1, -1, 2)
    wanted = attend_block(queries, (copied[0], copied[1]), torch.cat([seen, twice], -1), (own[0], own[1]), own_seen)
    found = attend_block(queries, (keys, values), added, (own[0], own[1]), own_seen)
    torch.testing.assert_close(found, wanted)
    run = lambda q, k, v, ok, ov: attend_block(q, (k, v), added, (ok, ov), own_seen)  # noqa: E731
    torch.autograd.gradcheck(run, states, fast_mode=True)


def test_a_query_that_sees_nothing_has_output_and_gradient_zero() -> None:
    states, (seen, own_seen) = case(2, 3)
    seen[0, 2], own_seen[0] = False, False
    out, *gradients = attended(attend_block, states, (seen, own_seen))
    assert all(x.isfinite().all() for x in (out, *gradients))
    assert not out[0, :, 4].any() and not gradients[0][0, :, 4].any()
    assert out[0, :, :4].all() and out[0, :, 6:].all() and out[1].all()


def test_under_autocast_states_are_rounded_and_the_softmax_is_not() -> None:
    states, masks = case(2, 3, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = attended(attend_block, states, masks)
    rough = [x.detach().bfloat16().requires_grad_() for x in states]
    assert found[0].dtype == torch.bfloat16 and found[1].dtype == torch.float32
    for x, wanted in zip(found, attended(attend_block, rough, masks)):
        torch.testing.assert_close(x.bfloat16(), wanted, rtol=0.02, atol=0.02)


def saved_bytes(run: Any) -> int:
    """Bytes that `run` keeps for its backward pass, every storage once, masks apart."""
    sizes: dict[int, int] = {}
    kept = []

    def pack(x: Tensor) -> Tensor:
        if x.is_floating_point():
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        kept.append(x)  # no address is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept.append(run())
    return sum(sizes.values())


def test_what_the_backward_pass_needs_grows_with_queries_and_entries_not_their_product() -> None:
    def kept(size: int, function: Any) -> int:
        queries, *rest = (torch.randn(1, heads, size, 8, requires_grad=True) for heads in (4, 2, 2, 2, 2))
        seen = torch.ones(1, size, size, dtype=torch.bool).tril()
        mask = torch.ones(1, 1, dtype=torch.bool)
        return saved_bytes(lambda: function(queries, (rest[0], rest[1]), seen, (rest[2], rest[3]), mask))

    assert kept(128, attend_block) == 2 * kept(64, attend_block)
    assert kept(128, plain_block) > 3 * kept(64, plain_block)  # the count sees scores


@pytest.fixture(params=["eagle3", "dflash"])
def drafter(request: pytest.FixtureRequest, tiny_target: Target) -> Any:
    torch.manual_seed(3)
    vocabulary = draft_vocabulary(torch.arange(40), tiny_target.vocab_size, 40)
    return new_drafter(tiny_target, vocabulary, request.param, num_hidden_layers=1).train()


def steps(drafter: Any, target: Target, length: int) -> Tensor:
    """A loss of three steps below every token of a text."""
    ids = torch.randint(target.vocab_size, (1, length), generator=torch.Generator().manual_seed(5))
    paths = along.paths(torch.arange(length - 1)[None], torch.zeros(1, length - 1, 3, dtype=torch.long))
    entries = along.entries(target, ids, drafter.needs.layers)
    found: Tensor = drafter(entries, paths, lambda states, head: (states @ head.T).square().sum())
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_drafters_training_pass_keeps_no_scores(drafter: Any, tiny_target: Target, checkpointing: bool) -> None:
    if checkpointing:
        drafter.gradient_checkpointing_enable()
    small, large = (saved_bytes(lambda n=n: steps(drafter, tiny_target, n)) for n in (101, 201))
    assert large < 2.1 * small


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_drafters_gradients_are_those_of_the_plain_formula(
    drafter: Any, tiny_target: Target, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradients() -> dict[str, Tensor]:
        drafter.zero_grad()
        steps(drafter, tiny_target, 30).backward()
        return {name: weight.grad.clone() for name, weight in drafter.named_parameters() if weight.grad is not None}

    with monkeypatch.context() as patch:
        module = "eagle3.recurrent" if drafter.config.model_type == "vsd_eagle3" else "dflash.model"
        patch.setattr(f"vsd.drafters.{module}.attend_block", plain_block)
        wanted = gradients()
    if checkpointing:
        drafter.gradient_checkpointing_enable()
    found = gradients()
    assert wanted and found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()), msg=name)
