"""The DFlash2 drafter against a slow reference, decoding against training, and its loss against a plain formula."""

from pathlib import Path
from typing import Any

import plain
import pytest
import torch
from torch import Tensor

import along
from vsd.drafters import draft_vocabulary, new_drafter
from vsd.drafters.dflash import DFlashDrafter
from vsd.drafters.dflash2 import DFlash2Drafter
from vsd.drafters.lattice import Lattice, logits
from vsd.drafters.load import start_drafter
from vsd.errors import ConfigurationError
from vsd.objective import HeadTarget, PathTarget, fused_loss, objective
from vsd.paths import TreeShape
from vsd.targets import Target

K, N = 4, 6
KINDS: list[dict[str, Any]] = [{}, {"causal": True, "conv_kernel_size": 3}, {"sample_from_anchor": True}]
FIELDS = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k", "sample_from_anchor", "causal")


def drafter_of(target: Target, **options: Any) -> DFlash2Drafter:
    torch.manual_seed(1)
    return DFlash2Drafter.for_target(
        target, draft_vocabulary(torch.arange(128), 128, 128), num_hidden_layers=2, **options
    ).eval()


@pytest.fixture(params=KINDS, ids=str)
def drafter(request: pytest.FixtureRequest, tiny_target: Target) -> DFlash2Drafter:
    sizes = {"conv_group_size": 8, "selector_rank": 5, "selector_top_k": N}
    drafter = drafter_of(tiny_target, **sizes, **request.param)
    plain.randomised(drafter)
    return drafter


def convolution(xs: list[Tensor], base: Tensor, kernels: list[Tensor], group: int) -> list[Tensor]:
    """One channel at a time: xs [h] of a block, base [T, h], kernels [T, G] of every token."""
    found = []
    for t, kernel in enumerate(kernels):
        y = torch.zeros_like(xs[0])
        for tap in range(min(len(base), t + 1)):
            for channel in range(len(y)):
                y[channel] += (base[tap, channel] + kernel[tap, channel // group]) * xs[t - tap][channel]
        found.append(y)
    return found


def reference(drafter: DFlash2Drafter, aux: Tensor, root_embed: Tensor, mask_embed: Tensor) -> Tensor:
    """States of a block behind the features [T, n h] of one text: [K, h]."""
    w = {name: tensor.double() for name, tensor in drafter.state_dict().items()}
    config, T = drafter.config, len(aux)
    theta, eps, D, h = config.rope_parameters["rope_theta"], config.rms_norm_eps, config.head_dim, config.hidden_size
    taps, group = config.conv_kernel_size, config.conv_group_size
    context = [plain.rms(w["fc.weight"] @ x.double(), w["hidden_norm.weight"], eps) for x in aux]
    masks = K - 1 if config.sample_from_anchor else K
    x = [embed.double() for embed in [root_embed, *[mask_embed] * masks]]

    def heads(at: str, name: str, a: Tensor) -> Tensor:
        return (w[f"{at}.self_attn.{name}_proj.weight"] @ a).view(-1, D)

    def key(at: str, a: Tensor, position: int) -> Tensor:
        return plain.rope(plain.rms(heads(at, "k", a), w[f"{at}.self_attn.k_norm.weight"], eps), position, theta)

    def kernels(at: str, a: list[Tensor]) -> list[Tensor]:
        return [(w[f"{at}.kernel_projection.weight"] @ some).view(2, taps, h // group) for some in a]

    def attention(at: str, a: list[Tensor]) -> list[Tensor]:
        read, found = [*context, *a], []
        keys = [key(at, some, position) for position, some in enumerate(read)]
        values = [heads(at, "v", some) for some in read]
        for j, some in enumerate(a):
            query = plain.rms(heads(at, "q", some), w[f"{at}.self_attn.q_norm.weight"], eps)
            seen = T + j + 1 if config.causal else len(read)
            attended = plain.attend(plain.rope(query, T + j, theta), keys[:seen], values[:seen])
            found.append(w[f"{at}.self_attn.o_proj.weight"] @ attended)
        return found

    for i in range(config.num_hidden_layers):
        at = f"layers.{i}"
        for norm, conv in (("input_layernorm", "attention_conv"), ("post_attention_layernorm", "mlp_conv")):
            a = [plain.rms(some, w[f"{at}.{norm}.weight"], eps) for some in x]
            own, base = kernels(f"{at}.{conv}", a), w[f"{at}.{conv}.base_kernel"]
            a = convolution(a, base[0], [kernel[0] for kernel in own], group)
            a = attention(at, a) if conv == "attention_conv" else [plain.gated(some, w, f"{at}.mlp") for some in a]
            a = convolution(a, base[1], [kernel[1] for kernel in own], group)
            x = [before + some for before, some in zip(x, a)]
    return torch.stack([plain.rms(a, w["norm.weight"], eps) for a in x[-K:]])


def selected(drafter: DFlash2Drafter, head: Tensor, state: Tensor, before: int) -> Tensor:
    """log q [V] of the selector: the N likeliest tokens one by one."""
    w = {name: tensor.double() for name, tensor in drafter.candidate_selector.state_dict().items()}
    unary, projected = head.double() @ state, w["hidden_projection.weight"] @ state
    scores = torch.full((len(head),), float("-inf"), dtype=torch.float64)
    for token in unary.argsort(descending=True)[:N].tolist():
        edge = w["predecessor_codebook"][before] * projected * w["successor_codebook"][token]
        scores[token] = unary[token] + edge.sum()
    return scores.log_softmax(-1)


def test_q_equals_the_textbook(tiny_target: Target, drafter: DFlash2Drafter) -> None:
    """Two paths share a root, roots are not sorted; q depends on a path by the token before alone."""
    _ids, entries = plain.inputs(tiny_target, drafter)
    roots, tokens = torch.tensor([[7, 0, 7], [5, 9, 1]]), torch.randint(128, (2, 3, K))
    found = drafter(entries, along.paths(roots, tokens), logits).log_softmax(-1)  # [K, B, P, V]
    mask = tiny_target.embed(torch.tensor(drafter.config.mask_token_id))
    for b in range(2):
        for p, root in enumerate(roots[b].tolist()):
            first = entries.next_ids[b, root]
            states = reference(drafter, entries.aux[b, : root + 1], tiny_target.embed(first), mask)
            for k, before in enumerate([int(first), *tokens[b, p, :-1].tolist()]):
                wanted = selected(drafter, tiny_target.head_weight, states[k], before)
                torch.testing.assert_close(found[k, b, p].double(), wanted, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_decoding_equals_training(tiny_target: Target, drafter: DFlash2Drafter) -> None:
    """Ragged commits in pieces; what was drafted in between leaves no trace; log q of given tokens."""
    ids, entries = plain.inputs(tiny_target, drafter)
    tokens = torch.randint(128, (2, K), generator=torch.Generator().manual_seed(8))
    wanted = drafter(entries, along.paths(torch.tensor([[9], [5]]), tokens[:, None]), logits)[:, :, 0].log_softmax(-1)
    tokens = wanted.argmax(-1).T.where(torch.rand(2, K) < 0.5, tokens)  # some that can be drafted
    wanted = drafter(entries, along.paths(torch.tensor([[9], [5]]), tokens[:, None]), logits)[:, :, 0].log_softmax(-1)
    state = drafter.begin(
        along.text(ids[:, :5], torch.tensor([5, 2])), entries.aux[:, :5], torch.zeros(2, dtype=torch.long), 6
    )
    done = torch.tensor([5, 2])
    for counts in (torch.tensor([1, 3]), torch.tensor([4, 1])):
        index = (done[:, None] + torch.arange(int(counts.max()))).clamp(max=10)
        drafter.propose(state, ids[:, 3], TreeShape(K, 2, 6))
        aux = entries.aux.gather(1, index[..., None].expand(-1, -1, entries.aux.shape[-1]))
        drafter.advance(state, aux, entries.next_ids.gather(1, index), counts)
        done += counts
    found = drafter.log_q(state, ids.gather(1, done[:, None])[:, 0], tokens, 1.0)
    torch.testing.assert_close(found, wanted.gather(-1, tokens.T[..., None])[..., 0].T, rtol=1e-3, atol=1e-3)
    assert found.isneginf().any() and found.isfinite().any()


@pytest.mark.parametrize("size", [40, 128])
def test_it_starts_as_the_dflash_drafter(tiny_target: Target, size: int) -> None:
    """Convolutions are the identity at first, so states are the same; other families are refused."""
    torch.manual_seed(1)
    vocabulary = draft_vocabulary(torch.arange(size), 128, size)
    trained = DFlashDrafter.for_target(tiny_target, vocabulary, num_hidden_layers=2, causal=True)
    plain.randomised(trained)
    started = start_drafter(trained, tiny_target, "dflash2", selector_rank=5)
    assert started.config.causal and started.config.selector_rank == 5 and started.vocabulary.size == 128
    _ids, entries = plain.inputs(tiny_target, started)
    paths = along.paths(torch.tensor([[7], [5]]), torch.zeros(2, 1, K, dtype=torch.long))
    assert torch.equal(along.states(started, entries, paths)[..., :32], along.states(trained, entries, paths))
    with pytest.raises(ConfigurationError, match="starts from a DFlash drafter, not from a DFlash2Drafter"):
        start_drafter(started, tiny_target, "dflash2")


def test_any_vocabulary_becomes_the_whole_one(tiny_target: Target) -> None:
    vocabulary = draft_vocabulary(torch.arange(40), 128, 40)
    assert new_drafter(tiny_target, vocabulary, "dflash2").vocabulary.size == 128
    for options in ({"draft_vocab_size": 40}, {"selector_top_k": 129}, {"conv_group_size": 5}):
        with pytest.raises(ConfigurationError, match="do not fit family dflash2"):
            new_drafter(tiny_target, vocabulary, "dflash2", **options)


def test_saved_and_loaded_bit_for_bit(drafter: DFlash2Drafter, tiny_target: Target, tmp_path: Path) -> None:
    plain.check_saved(tiny_target, drafter, tmp_path, FIELDS)


# ---- training


@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_loss_is_that_of_marginals_and_selector(written: bool, temperature: float) -> None:
    """Cross-entropy of all tokens by themselves, and of the candidates; on a path of the drafter only the latter."""
    g = torch.Generator().manual_seed(3)
    steps, R, V, h, r, n = 3, 5, 20, 6, 4, 5
    states = torch.randn(steps, R, h + r, generator=g, dtype=torch.float64).requires_grad_()
    unary, codebook = (torch.randn(V, size, generator=g, dtype=torch.float64).requires_grad_() for size in (h, r))
    hidden, rows = torch.randn(7, 3, generator=g).double(), torch.randint(7, (steps, R), generator=g)
    weight, labels = torch.randn(V, 3, generator=g).double(), torch.randint(V, (steps, R), generator=g)
    normaliser = (hidden @ weight.T / temperature).logsumexp(-1)
    target = HeadTarget(hidden, weight, None, normaliser, lambda x: x, temperature)
    valid = torch.arange(steps)[:, None] < torch.tensor([3, 2, 3, 1, 0])
    share = torch.rand(R, generator=g).double()
    paths = PathTarget(labels, rows, valid, share, temperature=temperature, written=written)
    terms = objective("eagle3").parts[0].terms
    found = fused_loss(states, Lattice(unary, codebook, n), target, paths, terms, chunk_rows=4)
    wanted, correct = torch.zeros((), dtype=torch.float64), torch.zeros(steps)
    for k in range(steps):
        for c in range(R):
            if not valid[k, c]:
                continue
            p = (weight @ hidden[rows[k, c]] / temperature).softmax(-1)
            u = unary @ states[k, c, :h]
            best = u.argsort(descending=True)[:n]
            score = u[best] + codebook[best] @ states[k, c, h:]
            loss = -p[best] @ (score / temperature).log_softmax(-1)
            if written:
                loss = loss - p @ (u / temperature).log_softmax(-1)
            wanted = wanted + 0.8**k * share[c] * loss
            correct[k] += best[score.argmax()] == labels[k, c]
    torch.testing.assert_close(found.loss, wanted)
    assert torch.equal(found.correct, correct)
    leaves = (states, unary, codebook)
    for mine, theirs in zip(torch.autograd.grad(found.loss, leaves), torch.autograd.grad(wanted, leaves)):
        torch.testing.assert_close(mine, theirs)


def test_activation_checkpointing_gives_the_same_gradient(tiny_target: Target, drafter: DFlash2Drafter) -> None:
    _ids, entries = plain.inputs(tiny_target, drafter)
    paths, found = along.paths(torch.tensor([[7, 3], [5, 9]]), torch.randint(128, (2, 2, K))), []

    def loss(states: Tensor, head: Lattice) -> Tensor:
        return logits(states, head).clamp(min=-9).square().sum()

    for _ in range(2):
        drafter.train().zero_grad()
        drafter(entries, paths, loss).backward()
        found.append({name: weight.grad.clone() for name, weight in drafter.named_parameters()})
        drafter.gradient_checkpointing_enable()
    assert all(gradient.any() for gradient in found[0].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)
