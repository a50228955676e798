"""The P-EAGLE drafter against a slow reference, decoding against training, and its start from an EAGLE-3 drafter."""

from pathlib import Path

import plain
import pytest
import torch
from torch import Tensor

import along
from vsd.drafters import draft_vocabulary
from vsd.drafters.eagle3 import Eagle3Drafter
from vsd.drafters.load import start_drafter
from vsd.drafters.peagle import PeagleDrafter
from vsd.errors import VSDError
from vsd.paths import TreeShape
from vsd.targets import Target

K = 4


@pytest.fixture(params=[1, 3])
def drafter(request: pytest.FixtureRequest, tiny_target: Target) -> PeagleDrafter:
    torch.manual_seed(1)
    vocabulary = draft_vocabulary(torch.randint(tiny_target.vocab_size, (500,)), tiny_target.vocab_size, 40)
    drafter = PeagleDrafter.for_target(tiny_target, vocabulary, num_hidden_layers=request.param)
    plain.randomised(drafter)
    return drafter.eval()


def reference(drafter: PeagleDrafter, aux: Tensor, next_embeds: Tensor, mask_embed: Tensor) -> Tensor:
    """Entries [T, ·] of one text up to the root, then K - 1 mask nodes, as one causal sequence: [K, h]."""
    w = {name: tensor.double() for name, tensor in drafter.state_dict().items()}
    config, T = drafter.config, len(aux)
    theta, eps, D = config.rope_parameters["rope_theta"], config.rms_norm_eps, config.head_dim
    hidden = [w["fc.weight"] @ x.double() for x in [*aux, *[drafter.mask_hidden[0]] * (K - 1)]]
    embeds = [*next_embeds.double(), *[mask_embed.double()] * (K - 1)]
    for i in range(config.num_hidden_layers):
        at, keys, values, new = f"layers.{i}", [], [], []
        for position, (x, embed) in enumerate(zip(hidden, embeds)):
            if i:
                a = plain.rms(x, w[f"{at}.input_layernorm.weight"], eps)
            else:
                own = plain.rms(x, w[f"{at}.hidden_norm.weight"], eps)
                a = torch.cat([plain.rms(embed, w[f"{at}.input_layernorm.weight"], eps), own])
            q, k, v = ((w[f"{at}.self_attn.{name}_proj.weight"] @ a).view(-1, D) for name in "qkv")
            keys.append(plain.rope(k, position, theta))
            values.append(v)
            distances = (T - 1 - torch.arange(position + 1)).clamp(min=0)
            lost = drafter.locality_slope * distances if position >= T else 0.0
            attended = plain.attend(plain.rope(q, position, theta), keys, values, lost)
            x = x + w[f"{at}.self_attn.o_proj.weight"] @ attended
            inner = plain.rms(x, w[f"{at}.post_attention_layernorm.weight"], eps)
            new.append(x + plain.gated(inner, w, f"{at}.mlp"))
        hidden = new
    return torch.stack([plain.rms(x, w["norm.weight"], eps) for x in hidden[T - 1 :]])


@pytest.mark.parametrize("locality", [0.0, 0.7])
def test_states_equal_one_causal_sequence(tiny_target: Target, drafter: PeagleDrafter, locality: float) -> None:
    """Two paths share a root, roots are not sorted; what is drafted on a path changes nothing."""
    drafter.locality_slope = locality
    _ids, entries = plain.inputs(tiny_target, drafter)
    roots = torch.tensor([[7, 0, 7, 10], [5, 9, 1, 2]])
    found = along.states(drafter, entries, along.paths(roots, torch.randint(128, (2, 4, K))))
    mask = tiny_target.embed(torch.tensor(drafter.config.mask_token_id))
    for b in range(2):
        for p, root in enumerate(roots[b].tolist()):
            aux, embeds = entries.aux[b, : root + 1], tiny_target.embed(entries.next_ids[b, : root + 1])
            wanted = reference(drafter, aux, embeds, mask)
            torch.testing.assert_close(found[:, b, p].double(), wanted, rtol=2e-5, atol=2e-5)


@torch.no_grad()
def test_decoding_equals_training(tiny_target: Target, drafter: PeagleDrafter) -> None:
    """Ragged commits in three pieces; what was drafted in between leaves no trace; positions jump once."""
    _ids, entries = plain.inputs(tiny_target, drafter)
    roots = torch.tensor([[9], [5]])
    wanted = along.states(drafter, entries, along.paths(roots, torch.zeros(2, 1, K, dtype=torch.long)))[:, :, 0]
    state, done = drafter.new_cache(2, 4), torch.zeros(2, dtype=torch.long)
    for counts in (torch.tensor([5, 2]), torch.tensor([1, 3]), torch.tensor([4, 1])):
        index = (done[:, None] + torch.arange(int(counts.max()))).clamp(max=10)
        aux = entries.aux.gather(1, index[..., None].expand(-1, -1, entries.aux.shape[-1]))
        drafter.advance(state, aux, entries.next_ids.gather(1, index), counts)
        found = drafter.block(state, torch.zeros(2, dtype=torch.long), K)
        done += counts
    assert done.tolist() == [10, 6] == state.next.tolist()
    torch.testing.assert_close(found.transpose(0, 1), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(drafter.block(state, done, 2), found[:, :2], rtol=1e-4, atol=1e-5)  # shorter blocks


def test_every_weight_is_trained(tiny_target: Target, drafter: PeagleDrafter) -> None:
    plain.check_training(tiny_target, drafter, K)


def test_it_starts_as_the_eagle3_drafter(tiny_target: Target) -> None:
    """The first proposals are the same; the rest of a block is new, and has a gradient."""
    torch.manual_seed(2)
    vocabulary = draft_vocabulary(torch.arange(60), 128, 60)
    trained = Eagle3Drafter.for_target(tiny_target, vocabulary, intermediate_size=48, initializer_range=0.3)
    started = start_drafter(trained, tiny_target, "peagle", num_hidden_layers=2)
    assert started.config.num_hidden_layers == 2 and started.config.intermediate_size == 48
    assert torch.equal(started.vocabulary.ids, vocabulary.ids)
    ids = torch.randint(15, 128, (1, 9))
    read = along.entries(tiny_target, ids, trained.needs.layers)
    trees = []
    for drafter in (trained, started):
        state = drafter.begin_at(read, torch.tensor([[6]]), 8)
        trees.append(drafter.propose(state, ids[0, 7:8], TreeShape(1, 3, 4)))
    assert torch.equal(trees[0].tokens, trees[1].tokens)
    torch.testing.assert_close(trees[0].log_q, trees[1].log_q)
    with pytest.raises(VSDError, match="does not start from another family's"):
        start_drafter(trained, tiny_target, "lm")
    with pytest.raises(VSDError, match="starts from an EAGLE-3 drafter, not from a PeagleDrafter"):
        start_drafter(started, tiny_target, "peagle")


def test_saved_and_loaded_bit_for_bit(drafter: PeagleDrafter, tiny_target: Target, tmp_path: Path) -> None:
    fields = ("num_hidden_layers", "mask_token_id")
    plain.check_saved(tiny_target, drafter, tmp_path, fields)
