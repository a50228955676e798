"""The DFlash drafter against a slow reference, decoding against training, and what it shares with its target."""

import copy
from pathlib import Path
from typing import Any

import plain
import pytest
import torch
from torch import Tensor

import along
from vsd.drafters import draft_vocabulary, load_drafter
from vsd.drafters.dflash import DFlashDrafter
from vsd.drafters.dflash.model import spread_layers
from vsd.targets import Target

K = 4
KINDS: list[dict[str, Any]] = [{}, {"causal": True}, {"sample_from_anchor": True}]


def drafter_of(target: Target, size: int = 40, **options: Any) -> DFlashDrafter:
    torch.manual_seed(1)
    vocabulary = draft_vocabulary(torch.randint(target.vocab_size, (500,)), target.vocab_size, size)
    return DFlashDrafter.for_target(target, vocabulary, num_hidden_layers=2, **options).eval()


@pytest.fixture(params=KINDS, ids=str)
def drafter(request: pytest.FixtureRequest, tiny_target: Target) -> DFlashDrafter:
    drafter = drafter_of(tiny_target, **request.param)
    plain.randomised(drafter)
    return drafter


def reference(drafter: DFlashDrafter, aux: Tensor, root_embed: Tensor, mask_embed: Tensor) -> Tensor:
    """A block behind the features [T, n h] of one text: [K, h]."""
    w = {name: tensor.double() for name, tensor in drafter.state_dict().items()}
    config, T = drafter.config, len(aux)
    theta, eps, D = config.rope_parameters["rope_theta"], config.rms_norm_eps, config.head_dim
    context = [plain.rms(w["fc.weight"] @ x.double(), w["hidden_norm.weight"], eps) for x in aux]
    masks = K - 1 if config.sample_from_anchor else K
    x = [embed.double() for embed in [root_embed, *[mask_embed] * masks]]

    def heads(at: str, name: str, a: Tensor) -> Tensor:
        return (w[f"{at}.self_attn.{name}_proj.weight"] @ a).view(-1, D)

    def key(at: str, a: Tensor, position: int) -> Tensor:
        return plain.rope(plain.rms(heads(at, "k", a), w[f"{at}.self_attn.k_norm.weight"], eps), position, theta)

    for i in range(config.num_hidden_layers):
        at = f"layers.{i}"
        normed = [plain.rms(a, w[f"{at}.input_layernorm.weight"], eps) for a in x]
        read = [*context, *normed]
        keys = [key(at, a, position) for position, a in enumerate(read)]
        values = [heads(at, "v", a) for a in read]
        for j, a in enumerate(normed):
            query = plain.rms(heads(at, "q", a), w[f"{at}.self_attn.q_norm.weight"], eps)
            seen = T + j + 1 if config.causal else len(read)
            lost = (drafter.locality_slope * (T - 1 - torch.arange(seen))).clamp(min=0)
            attended = plain.attend(plain.rope(query, T + j, theta), keys[:seen], values[:seen], lost)
            x[j] = x[j] + w[f"{at}.self_attn.o_proj.weight"] @ attended
            inner = plain.rms(x[j], w[f"{at}.post_attention_layernorm.weight"], eps)
            x[j] = x[j] + plain.gated(inner, w, f"{at}.mlp")
    return torch.stack([plain.rms(a, w["norm.weight"], eps) for a in x[-K:]])


@pytest.mark.parametrize("locality", [0.0, 0.7])
def test_states_equal_the_textbook(tiny_target: Target, drafter: DFlashDrafter, locality: float) -> None:
    """Two paths share a root, roots are not sorted; what is drafted on a path changes nothing."""
    drafter.locality_slope = locality
    _ids, entries = plain.inputs(tiny_target, drafter)
    roots = torch.tensor([[7, 0, 7, 10], [5, 9, 1, 2]])
    found = along.states(drafter, entries, along.paths(roots, torch.randint(128, (2, 4, K))))
    mask = tiny_target.embed(torch.tensor(drafter.config.mask_token_id))
    for b in range(2):
        for p, root in enumerate(roots[b].tolist()):
            embed = tiny_target.embed(entries.next_ids[b, root])
            wanted = reference(drafter, entries.aux[b, : root + 1], embed, mask)
            torch.testing.assert_close(found[:, b, p].double(), wanted, rtol=2e-5, atol=2e-5)


@torch.no_grad()
def test_decoding_equals_training(tiny_target: Target, drafter: DFlashDrafter) -> None:
    """Ragged commits in three pieces; what was drafted in between leaves no trace."""
    ids, entries = plain.inputs(tiny_target, drafter)
    roots = torch.tensor([[9], [5]])
    wanted = along.states(drafter, entries, along.paths(roots, torch.zeros(2, 1, K, dtype=torch.long)))[:, :, 0]
    prompt = along.text(ids[:, :5], torch.tensor([5, 2]))
    state = drafter.begin(prompt, entries.aux[:, :5], torch.zeros(2, dtype=torch.long), 6)
    done = torch.tensor([5, 2])
    for counts in (torch.tensor([1, 3]), torch.tensor([4, 1])):
        index = (done[:, None] + torch.arange(int(counts.max()))).clamp(max=10)
        drafter.block(state, ids[:, 3], K)
        aux = entries.aux.gather(1, index[..., None].expand(-1, -1, entries.aux.shape[-1]))
        drafter.advance(state, aux, entries.next_ids.gather(1, index), counts)
        done += counts
    assert done.tolist() == [10, 6] == state.next.tolist()
    found = drafter.block(state, ids.gather(1, done[:, None])[:, 0], K)
    torch.testing.assert_close(found.transpose(0, 1), wanted, rtol=1e-4, atol=1e-5)


def test_every_weight_is_trained(tiny_target: Target, drafter: DFlashDrafter) -> None:
    plain.check_training(tiny_target, drafter, K)


def test_norm_and_head_start_as_the_targets(tiny_target: Target) -> None:
    drafter = drafter_of(tiny_target)
    assert torch.equal(drafter.lm_head.weight, tiny_target.head_weight[drafter.vocabulary.ids])
    hidden = torch.randn(3, 32)
    torch.testing.assert_close(drafter.norm(hidden), tiny_target.norm(hidden), rtol=1e-4, atol=1e-5)


def test_a_whole_vocabulary_shares_the_targets_head(tiny_target: Target, tmp_path: Path) -> None:
    drafter = drafter_of(tiny_target, 128)
    names = {name for name, _ in drafter.named_parameters()}
    assert "lm_head.weight" not in names | drafter.state_dict().keys()
    ids, entries = plain.inputs(tiny_target, drafter)
    paths = along.paths(torch.tensor([[7], [5]]), torch.zeros(2, 1, K, dtype=torch.long))
    head = drafter(entries, paths, lambda states, head: head)
    assert head is tiny_target.head_weight
    drafter.save_pretrained(tmp_path)
    again = load_drafter(tmp_path, tiny_target)
    states = torch.randn(2, 32)
    torch.testing.assert_close(again.log_probs(states, ids[:, 0]), (states @ head.T).log_softmax(-1))


def test_default_feature_layers_are_spread() -> None:
    assert spread_layers(36, 5) == (2, 10, 18, 26, 34)  # as in the released drafters of Qwen3-8B, outputs 1, 9, …
    assert spread_layers(30, 3) == (2, 15, 28)
    assert spread_layers(4, 3) == (1, 2, 3)


def test_saved_and_loaded_bit_for_bit(drafter: DFlashDrafter, tiny_target: Target, tmp_path: Path) -> None:
    fields = ("causal", "sample_from_anchor", "mask_token_id", "num_hidden_layers", "aux_layers")
    plain.check_saved(tiny_target, drafter, tmp_path, fields)


def test_a_copy_shares_the_targets_head(tiny_target: Target) -> None:
    """Objectives that keep the first drafter copy it: the target's weights, packed ones too, are not copied."""
    drafter = DFlashDrafter.for_target(tiny_target, draft_vocabulary(torch.arange(128), 128, 128))
    copied = copy.deepcopy(drafter)
    assert drafter.config.shares_head and copied.lm_head.weight is drafter.lm_head.weight
    assert copied.norm.weight is not drafter.norm.weight
