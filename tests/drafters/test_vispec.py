"""The ViSpec drafter against a slow reference with images read one by one, and decoding against training."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import attend, check_saved, gated, randomised, rms, rope
from safetensors.torch import load_file, save_file
from torch import Tensor

import along
import seeing
from architectures import llama
from vsd.decoding import Engine, Sampling
from vsd.drafters import FAMILIES, draft_vocabulary, load_drafter, new_drafter
from vsd.drafters.dflash.model import SharedHead
from vsd.drafters.vispec import ViSpecConfig, ViSpecDrafter
from vsd.drafters.vispec.images import Images
from vsd.errors import ConfigurationError, MismatchError
from vsd.export import export_drafter
from vsd.paths import Entries, TreeShape, continue_text, extended
from vsd.targets import Padded, Target

K = 3
TAIL = [40, 41, 60, 43, 44, 70, 46, 47]
PICTURES = [seeing.picture(n, 8 + 4 * n, 16) for n in range(3)]
ROWS: list[tuple[str, int]] = [("only text here", 0), ("a # b", 1), ("# then # x", 2), ("ends with #", 1)]
CLOSE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-5}


class Text(NamedTuple):
    """Prompts and tokens behind them, in a batch; `lengths` of the prompts."""

    padded: Padded
    entries: Entries
    lengths: list[int]


@pytest.fixture(scope="module")
def target() -> Target:
    return seeing.target("llava")


def made(target: Target, vocabulary: int = 90, **options: Any) -> Any:
    torch.manual_seed(1)
    drafter: Any = new_drafter(target, draft_vocabulary(torch.arange(15, 100), 128, vocabulary), "vispec", **options)
    randomised(drafter)
    return drafter.eval()


@pytest.fixture(scope="module", params=[1, 2, 4])
def drafter(request: pytest.FixtureRequest, target: Target) -> Any:
    """With so many queries; the tiny images have four tokens."""
    return made(target, image_queries=request.param)


def text(target: Target, *rows: tuple[str, int], tail: list[int] = TAIL) -> Text:
    prompts = [seeing.read(target, words, *PICTURES[:count]) for words, count in rows]
    padded = Padded.of([prompt.followed_by(tail) for prompt in prompts])
    entries = Entries.of(padded, target.features(padded, (0, 4)).aux)
    return Text(padded, entries, [len(prompt.ids) for prompt in prompts])


def roots_of(found: Text, *behind: int) -> Tensor:
    """Entries whose next token is that of the tail at these places, [B, P]."""
    return torch.tensor(found.lengths)[:, None] - 1 + torch.tensor(behind)


def path_of(found: Text, roots: Tensor) -> Tensor:
    return torch.stack([found.padded.ids.gather(1, roots + 2 + k) for k in range(K)], -1)


def reference(drafter: Any, target: Target, aux: Tensor, ids: list[int], root: int, path: list[int]) -> Tensor:
    """One root of one text, in float64, entry by entry and key by key: aux [T, 2 h] -> states [K, h]."""
    w = {name: tensor.double() for name, tensor in drafter.state_dict().items()}
    config, h = drafter.config, drafter.config.hidden_size
    heads, kv_heads, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    theta, placeholder = config.rope_parameters["rope_theta"], config.image_token_id
    aux, embed = aux.double(), lambda token: target.embed(torch.tensor(token)).double()

    def linear(x: Tensor, name: str) -> Tensor:
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    def compressed(embeds: list[Tensor]) -> list[Tensor]:
        keys = [(w["imadpt.k_proj.weight"] @ x).view(heads, D) for x in embeds]
        values = [(w["imadpt.v_proj.weight"] @ x).view(heads, D) for x in embeds]
        return [w["imadpt.o_proj.weight"] @ attend(query, keys, values) for query in w["imadpt.q"]]

    def text_input(token: int, state: Tensor, vector: Tensor) -> Tensor:
        return linear(torch.cat([embed(token), linear(torch.cat([state, vector]), "img_fc")]), "fc")

    def project(x: Tensor, name: str, count: int) -> Tensor:
        return (w[f"layers.0.self_attn.{name}_proj.weight"] @ x).view(count, D)

    inputs: list[tuple[int, Tensor]] = []  # position, input
    vector, image = torch.zeros(h).double(), list[Tensor]()
    for t in range(root + 1):
        if ids[t + 1] == placeholder:
            image.append(aux[t + 1, :h])
            if ids[t + 2] != placeholder:
                *stand, vector = compressed(image)
                stand = stand[max(0, len(stand) - len(image)) :]
                inputs += [(t - len(stand) + 1 + i, x) for i, x in enumerate(stand)]
                image = []
        else:
            inputs.append((t, text_input(ids[t + 1], aux[t, h:], vector)))
    keys = [rope(project(x, "k", kv_heads), t, theta) for t, x in inputs]
    values = [project(x, "v", kv_heads) for _, x in inputs]
    x, steps = inputs[-1][1], []
    for k in range(len(path)):
        if k:
            x = text_input(path[k - 1], steps[-1], vector)
            keys.append(rope(project(x, "k", kv_heads), root + k, theta))
            values.append(project(x, "v", kv_heads))
        queries = rope(project(x, "q", heads), root + k, theta)
        r = x + w["layers.0.self_attn.o_proj.weight"] @ attend(queries, keys, values)
        steps.append(
            r + gated(rms(r, w["layers.0.post_attention_layernorm.weight"], config.rms_norm_eps), w, "layers.0.mlp")
        )
    return torch.stack(steps)


def test_states_equal_the_textbook(target: Target, drafter: Any) -> None:
    """Text, one image, two images and an image at the end, in one padded batch."""
    found = text(target, *ROWS)
    roots = roots_of(found, 0, 3)
    path = path_of(found, roots)
    states = along.states(drafter, found.entries, along.paths(roots, path))
    for b in range(len(ROWS)):
        for p in range(2):
            root, ids = int(roots[b, p]), found.padded.ids[b].tolist()
            wanted = reference(drafter, target, found.entries.aux[b], ids, root, path[b, p].tolist())
            torch.testing.assert_close(states[:, b, p].double(), wanted, rtol=5e-5, atol=5e-5)


def test_a_batch_is_its_rows(target: Target, drafter: Any) -> None:
    found = text(target, *ROWS)
    roots = roots_of(found, 0, 2)
    together = along.states(drafter, found.entries, along.paths(roots, path_of(found, roots)))
    for b, row in enumerate(ROWS):
        one = text(target, row)
        roots = roots_of(one, 0, 2)
        alone = along.states(drafter, one.entries, along.paths(roots, path_of(one, roots)))
        torch.testing.assert_close(together[:, b], alone[:, 0], rtol=1e-3, atol=1e-4)  # the target's own passes differ


@torch.no_grad()
def test_decoding_equals_training_position_by_position(target: Target, drafter: Any) -> None:
    """Prompts with and without images in one batch; then ragged commits, and two nodes side by side behind each."""
    found = text(target, *ROWS)
    ids, entries = found.padded.ids, found.entries
    prompt = Padded.of([seeing.read(target, words, *PICTURES[:count]) for words, count in ROWS])
    width = prompt.ids.shape[1]
    root = ids.gather(1, prompt.lengths[:, None])[:, 0]
    state = drafter.begin(prompt, entries.aux[:, :width], root, 3)  # too small: it has to grow
    at = prompt.lengths - 1  # entry of the root
    for counts in (torch.zeros(4, dtype=torch.long), torch.tensor([1, 3, 2, 1]), torch.tensor([2, 1, 1, 3])):
        if counts.any():
            index = at[:, None] + 1 + torch.arange(int(counts.max()))
            aux = entries.aux.gather(1, index[..., None].expand(-1, -1, entries.aux.shape[-1]))
            drafter.advance(state, aux, entries.next_ids.gather(1, index), counts)
            at = at + counts
        branches = [torch.tensor([[[50, 51, 52]]] * 4), torch.tensor([[[53, 54, 55]]] * 4)]
        wanted = [along.states(drafter, entries, along.paths(at[:, None], branch))[:, :, 0] for branch in branches]
        assert torch.equal(state.next, entries.positions.gather(1, at[:, None])[:, 0] + 1)
        torch.testing.assert_close(drafter.predicting(state.hidden)[:, 0], wanted[0][0], **CLOSE)
        hidden, own = state.hidden.expand(-1, 2, -1), torch.eye(2, dtype=torch.bool).expand(4, 2, 2)
        for k in range(1, K):
            tokens = torch.stack([branch[:, 0, k - 1] for branch in branches], dim=1)
            hidden = drafter.expand(state, hidden, tokens, k, own.repeat(1, 1, k))
            for w in range(2):
                torch.testing.assert_close(drafter.predicting(hidden)[:, w], wanted[w][k], **CLOSE)


@torch.no_grad()
def test_roots_inside_texts_begin_as_prompts_do(target: Target, drafter: Any) -> None:
    found = text(target, *ROWS)
    roots = roots_of(found, 1, 4)
    state = drafter.begin_at(found.entries, roots, 8)
    path = path_of(found, roots)
    wanted = along.states(drafter, found.entries, along.paths(roots, path))
    torch.testing.assert_close(drafter.predicting(state.hidden)[:, 0], wanted[0].flatten(0, 1), **CLOSE)
    hidden = drafter.expand(state, state.hidden, path[..., 0].view(-1, 1), 1, torch.ones(8, 1, 1, dtype=torch.bool))
    torch.testing.assert_close(drafter.predicting(hidden)[:, 0], wanted[1].flatten(0, 1), **CLOSE)


@torch.no_grad()
def test_continuations_between_two_images_read_the_first(target: Target, drafter: Any) -> None:
    """Their entries stand behind those of the whole text, and are read as those of a text that ends there."""
    found = text(target, ("# between them # x", 2))
    ids = found.padded.ids[0].tolist()
    first = max(i for i in range(len(ids) // 2) if ids[i] == drafter.config.image_token_id)
    root = torch.tensor([[first + 2]])
    drawn = continue_text(target, found.padded, root, 3, 1.0, torch.full((1, 1, 3), 0.4), (0, 4))
    assert drafter.config.image_token_id not in drawn.tokens
    whole = extended(found.entries, drawn)
    own = torch.tensor([[*ids[: first + 4], *drawn.tokens[0, 0].tolist()]])
    E, path = found.entries.next_ids.shape[1], torch.tensor([[[50, 51, 52]]])
    got = along.states(drafter, whole, along.paths(torch.tensor([[E + 1]]), path))
    read = along.text(own)._replace(extras=[found.padded.extras[0].upto(first + 4)])
    alone = Entries.of(read, target.features(read, (0, 4)).aux)
    wanted = along.states(drafter, alone, along.paths(torch.tensor([[first + 4]]), path))
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


def test_image_positions_reach_later_states_by_the_queries_alone(target: Target, drafter: Any) -> None:
    """States of the target at placeholders are not read; its input embeddings there are."""
    found = text(target, ("a # b", 1))
    h, here = drafter.config.hidden_size, found.padded.ids[0] == drafter.config.image_token_id
    roots = roots_of(found, 0, 4)
    paths = along.paths(roots, path_of(found, roots))
    before = along.states(drafter, found.entries, paths)
    aux = found.entries.aux.clone()
    first = int(here.nonzero()[0, 0])
    aux[0, first : first + int(here.sum()) - 1, h:] += 3.0  # of the last placeholder's entry the next token is text
    torch.testing.assert_close(along.states(drafter, found.entries._replace(aux=aux), paths), before)
    aux[0, first + 1, :h] += 1.0
    assert not torch.allclose(along.states(drafter, found.entries._replace(aux=aux), paths), before, atol=1e-3)


def test_a_new_drafter_adds_nothing_of_the_image_to_text(target: Target) -> None:
    torch.manual_seed(0)
    drafter: Any = new_drafter(target, draft_vocabulary(torch.arange(9), 128, 128), "vispec")
    state, vector = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    torch.testing.assert_close(drafter.img_fc(torch.cat([state, vector], -1)), state)
    assert isinstance(drafter.lm_head, SharedHead) and drafter.lm_head.weight is target.head_weight
    reduced: Any = new_drafter(target, draft_vocabulary(torch.arange(9), 128, 9), "vispec")
    assert torch.equal(reduced.lm_head.weight, target.head_weight[:9]) and reduced.lm_head.weight.requires_grad


def test_every_weight_is_trained_also_without_images(target: Target) -> None:
    """Replicas of one training wait for the gradient of every weight; activation checkpointing gives the same."""
    drafter = made(target).train()
    for rows in (ROWS, ROWS[:1]):
        found = text(target, *rows)
        roots = roots_of(found, 0, 3)
        paths = along.paths(roots, path_of(found, roots))
        gradients = []
        for checkpointing in (False, True):
            (drafter.gradient_checkpointing_enable if checkpointing else drafter.gradient_checkpointing_disable)()
            drafter.zero_grad()
            drafter(found.entries, paths, lambda states, head: (states @ head.T).square().sum()).backward()
            gradients.append({name: weight.grad.clone() for name, weight in drafter.named_parameters()})
        for name, gradient in gradients[0].items():
            assert gradient.any() or (rows is not ROWS and "imadpt" in name), name
            torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=1, max_size=3))
def test_images_are_runs_of_placeholders(rows: list[list[bool]]) -> None:
    found = Images.of(torch.tensor(rows))
    for b, row in enumerate(rows):
        runs: list[list[int]] = []
        for e, here in enumerate(row):
            if here:
                runs = [*runs[:-1], [*runs[-1], e]] if e and row[e - 1] else [*runs, [e]]
            assert int(found.begun[b, e]) == len(runs)
        assert [inside.nonzero()[:, 0].tolist() for inside in found.inside[b]][: len(runs)] == runs
        assert not found.inside[b, len(runs) :].any()
        assert all(int(found.left[b, e]) == run[-1] - e for run in runs for e in run)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3"])
def test_answers_at_temperature_0_are_those_of_plain_decoding(family: str) -> None:
    target = seeing.target(family)
    drafter = made(target, 128)
    drafter.freeze()
    prompts = [seeing.read(target, words, *PICTURES[:count]) for words, count in ROWS]
    plainly, drafted = (
        [
            result.tokens
            for result in Engine(target, one, TreeShape(3, 3, 8)).generate(prompts, Sampling(12, eos_ids=()))
        ]
        for one in (None, drafter)
    )
    assert drafted == plainly


def test_saved_and_loaded(target: Target, tmp_path: Path) -> None:
    for size in (40, 128):
        drafter = made(target, size, image_queries=3)
        fields = ("aux_layers", "image_token_id", "image_queries", "target_fingerprint", "draft_vocab_size")
        check_saved(target, drafter, tmp_path / str(size), fields)
        found = text(target, *ROWS)
        roots = roots_of(found, 0)
        paths = along.paths(roots, path_of(found, roots))
        again = load_drafter(tmp_path / str(size), target)  # packed
        states = again.states(found.entries, paths)
        torch.testing.assert_close(states, drafter.states(found.entries, paths), rtol=1e-4, atol=1e-4)
        assert torch.equal(again.rotary_emb.inv_freq, drafter.rotary_emb.inv_freq)


def released(drafter: Any, target: Target, folder: Path, **fields: Any) -> Path:
    """A folder as the paper's code writes it."""
    own = drafter.config
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps")
    sizes = {name: getattr(own, name) for name in (*names, "max_position_embeddings", "vocab_size", "hidden_act")}
    sizes |= {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "num_hidden_layers": 1}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**sizes, "rope_scaling": None, **fields}))
    tensors = {name: x.contiguous() for name, x in drafter.state_dict().items() if name not in ("d2t", "t2d")}
    save_file({**tensors, "embed_tokens.weight": target.embedding_weight.clone()}, folder / "model.safetensors")
    return folder


def test_released_checkpoints_are_read(target: Target, tmp_path: Path) -> None:
    drafter = made(target, 128, image_queries=3)
    again = load_drafter(released(drafter, target, tmp_path / "released"), target, trainable=True)
    assert isinstance(again, ViSpecDrafter) and again.config.image_queries == 3
    mine, theirs = drafter.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    with pytest.raises(MismatchError, match="attention with biases"):
        load_drafter(released(drafter, target, tmp_path / "biased", qkv_bias=True), target)
    with pytest.raises(MismatchError, match="reads no images"):
        load_drafter(tmp_path / "released", llama())
    tensors = load_file(tmp_path / "released" / "model.safetensors")
    del tensors["imadpt.q"]
    save_file(tensors, tmp_path / "released" / "model.safetensors")
    with pytest.raises(MismatchError, match="no queries for images"):
        load_drafter(tmp_path / "released", target)


def test_other_targets_and_fields_are_refused(target: Target, tmp_path: Path) -> None:
    vocabulary = draft_vocabulary(torch.arange(9), 128, 9)
    with pytest.raises(ConfigurationError, match="for targets that read images"):
        new_drafter(llama(), vocabulary, "vispec")
    with pytest.raises(ConfigurationError, match="the target decides aux_layers, hidden_size"):
        new_drafter(target, vocabulary, "vispec", hidden_size=64, aux_layers=[0, 1])
    drafter = made(target)
    with pytest.raises(MismatchError, match="the target reads none"):
        drafter.attach(llama())
    with pytest.raises(MismatchError, match="fingerprint"):
        drafter.attach(seeing.target("llava", seed=3))
    with pytest.raises(MismatchError, match="image_queries"):
        ViSpecDrafter(ViSpecConfig(image_queries=0))
    with pytest.raises(ConfigurationError, match="no engine serves a ViSpec drafter"):
        export_drafter(drafter, target, tmp_path / "out", "vllm")
    assert not FAMILIES["vispec"].formats
