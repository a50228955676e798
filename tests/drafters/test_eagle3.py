"""The EAGLE-3 drafter against a slow reference, decoding against training, and checkpoints that are what they say."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import along
from vsd.drafters import draft_vocabulary
from vsd.drafters.eagle3 import Eagle3Config, Eagle3Drafter
from vsd.drafters.feature_drafter import default_layers
from vsd.errors import VSDError
from vsd.paths import Entries
from vsd.targets import Target

K = 4
LAYERS = (0, 2, 3)
CHECKPOINT = {
    "fc.weight",
    "midlayer.self_attn.q_proj.weight",
    "midlayer.self_attn.k_proj.weight",
    "midlayer.self_attn.v_proj.weight",
    "midlayer.self_attn.o_proj.weight",
    "midlayer.mlp.gate_proj.weight",
    "midlayer.mlp.up_proj.weight",
    "midlayer.mlp.down_proj.weight",
    "midlayer.input_layernorm.weight",
    "midlayer.hidden_norm.weight",
    "midlayer.post_attention_layernorm.weight",
    "norm.weight",
    "lm_head.weight",
    "d2t",
    "t2d",
}


@pytest.fixture
def drafter(tiny_target: Target) -> Eagle3Drafter:
    """Random, norms included, so that no two of them can be swapped unnoticed."""
    torch.manual_seed(1)
    tokens = torch.randint(tiny_target.vocab_size, (500,))
    drafter = Eagle3Drafter.for_target(tiny_target, draft_vocabulary(tokens, tiny_target.vocab_size, 40))
    with torch.no_grad():
        for name, weight in drafter.named_parameters():
            weight.copy_(torch.rand_like(weight) + 0.5 if "norm" in name else torch.randn_like(weight) * 0.15)
    return drafter.eval()


def inputs(target: Target, rows: int = 2, length: int = 11) -> tuple[Tensor, Entries]:
    """Tokens [B, T + K + 1], and the entries of the first T."""
    ids = torch.randint(target.vocab_size, (rows, length + K + 1), generator=torch.Generator().manual_seed(5))
    read = along.entries(target, ids[:, :length], LAYERS)
    return ids, read._replace(next_ids=ids[:, 1 : length + 1])


def path_of(ids: Tensor, roots: Tensor) -> Tensor:
    """The K tokens below each root, [B, P, K]."""
    return torch.stack([ids.gather(1, roots + 2 + k) for k in range(K)], -1)


def reference(drafter: Eagle3Drafter, aux: Tensor, next_embeds: Tensor, root: int, path: Tensor) -> Tensor:
    """One root of one sequence, in float64, key by key: aux [T, 3h], next_embeds [T, h], path [K, h] -> [K, h]."""
    w = {name: tensor.double() for name, tensor in drafter.state_dict().items()}
    config = drafter.config
    heads, kv_heads, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    theta = config.rope_parameters["rope_theta"]

    def norm(x: Tensor, name: str) -> Tensor:
        return w[name] * x / (x.pow(2).mean() + config.rms_norm_eps).sqrt()

    def rope(x: Tensor, position: int) -> Tensor:
        out = x.clone()
        for i in range(D // 2):
            angle = torch.tensor(position * theta ** (-2 * i / D), dtype=torch.float64)
            a, b = x[:, i], x[:, i + D // 2]
            out[:, i], out[:, i + D // 2] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
        return out

    def project(a: Tensor, name: str, count: int) -> Tensor:
        return (w[f"midlayer.self_attn.{name}_proj.weight"] @ a).view(count, D)

    def join(embed: Tensor, hidden: Tensor) -> Tensor:
        return torch.cat([norm(embed, "midlayer.input_layernorm.weight"), norm(hidden, "midlayer.hidden_norm.weight")])

    fused = [w["fc.weight"] @ aux[t].double() for t in range(root + 1)]
    keys, values = [], []
    for t in range(root + 1):
        a = join(next_embeds[t].double(), fused[t])
        keys.append(rope(project(a, "k", kv_heads), t))
        values.append(project(a, "v", kv_heads))
    hidden, steps = fused[root], []
    for k in range(len(path)):
        a = join(path[k].double(), hidden)
        if k > 0:
            keys.append(rope(project(a, "k", kv_heads), root + k))
            values.append(project(a, "v", kv_heads))
        queries = rope(project(a, "q", heads), root + k)
        attended = []
        for head in range(heads):
            kv = head // (heads // kv_heads)
            weights = torch.stack([queries[head] @ key[kv] / D**0.5 for key in keys]).softmax(0)
            attended.append(sum(weight * value[kv] for weight, value in zip(weights, values)))
        residual = hidden + w["midlayer.self_attn.o_proj.weight"] @ torch.cat(attended)
        inner = norm(residual, "midlayer.post_attention_layernorm.weight")
        gate, up = w["midlayer.mlp.gate_proj.weight"] @ inner, w["midlayer.mlp.up_proj.weight"] @ inner
        hidden = residual + w["midlayer.mlp.down_proj.weight"] @ (torch.nn.functional.silu(gate) * up)
        steps.append(norm(hidden, "norm.weight"))
    return torch.stack(steps)


def test_states_equal_the_textbook(tiny_target: Target, drafter: Eagle3Drafter) -> None:
    ids, entries = inputs(tiny_target)
    roots = torch.tensor([[0, 3, 9], [5, 1, 10]])
    found = along.states(drafter, entries, along.paths(roots, path_of(ids, roots)))
    for b in range(2):
        for q, root in enumerate(roots[b].tolist()):
            path = tiny_target.embed(ids[b, root + 1 : root + 1 + K])
            wanted = reference(drafter, entries.aux[b], tiny_target.embed(entries.next_ids[b]), root, path)
            torch.testing.assert_close(found[:, b, q].double(), wanted, rtol=2e-5, atol=2e-5)


def test_states_depend_on_nothing_behind_the_root(tiny_target: Target, drafter: Eagle3Drafter) -> None:
    ids, entries = inputs(tiny_target)
    roots = torch.tensor([[4], [6]])
    paths = along.paths(roots, path_of(ids, roots))
    before = along.states(drafter, entries, paths)
    spoilt = entries._replace(aux=entries.aux.clone(), next_ids=entries.next_ids.clone())
    for b, root in enumerate([4, 6]):
        spoilt.aux[b, root + 1 :], spoilt.next_ids[b, root + 1 :] = 7.0, 3
    torch.testing.assert_close(along.states(drafter, spoilt, paths), before)
    spoilt.aux[0, 4] += 1.0
    assert not torch.allclose(along.states(drafter, spoilt, paths)[:, 0], before[:, 0])


def test_forward_hands_states_and_head_to_the_objective(tiny_target: Target, drafter: Eagle3Drafter) -> None:
    ids, entries = inputs(tiny_target)
    roots = torch.tensor([[4], [6]])
    paths = along.paths(roots, path_of(ids, roots))
    hidden, head = drafter(entries, paths, lambda hidden, head: (hidden, head))
    torch.testing.assert_close(hidden, drafter.states(entries, paths))
    assert head is drafter.lm_head.weight


@torch.no_grad()
def test_decoding_equals_training_along_two_branches(tiny_target: Target, drafter: Eagle3Drafter) -> None:
    """Ragged commits in three pieces, then two paths side by side: each node sees its own path alone."""
    ids, entries = inputs(tiny_target)
    roots = torch.tensor([[9], [5]])
    branches = [path_of(some, roots) for some in (ids, ids.flip(1))]
    wanted = [along.states(drafter, entries, along.paths(roots, branch))[:, :, 0] for branch in branches]  # [K, B, h]

    state = drafter.new_cache(2, 4)  # too small: it has to grow
    done = torch.zeros(2, dtype=torch.long)
    for counts in (torch.tensor([5, 2]), torch.tensor([1, 3]), torch.tensor([4, 1])):
        index = (done[:, None] + torch.arange(int(counts.max()))).clamp(max=10)
        aux = entries.aux.gather(1, index[..., None].expand(-1, -1, entries.aux.shape[-1]))
        drafter.advance(state, aux, entries.next_ids.gather(1, index), counts)
        done += counts
    assert done.tolist() == [10, 6] == state.next.tolist()
    torch.testing.assert_close(drafter.norm(state.hidden[:, 0]), wanted[0][0], rtol=1e-4, atol=1e-5)

    hidden = state.hidden.expand(-1, 2, -1)
    own = torch.eye(2, dtype=torch.bool).expand(2, 2, 2)
    for k in range(1, K):
        tokens = torch.stack([branch[:, 0, k - 1] for branch in branches], dim=1)
        hidden = drafter.expand(state, hidden, tokens, k, own.repeat(1, 1, k))
        for w in range(2):
            torch.testing.assert_close(drafter.norm(hidden[:, w]), wanted[w][k], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wanted[0][1], wanted[1][1], atol=1e-2)


@torch.no_grad()
def test_positions_behind_an_image_go_on_above_its_own(tiny_target: Target, drafter: Eagle3Drafter) -> None:
    """Prompts whose positions are not 0 … N - 1: decoding and training use the same ones."""
    ids, entries = inputs(tiny_target)
    jump = torch.arange(11).expand(2, -1) + 7 * (torch.arange(11) > 3)
    entries = entries._replace(positions=jump)
    roots = torch.tensor([[9], [9]])
    wanted = along.states(drafter, entries, along.paths(roots, path_of(ids, roots)))[:2, :, 0]
    prompt = along.text(ids[:, :9])._replace(positions=jump[:, :9])
    state = drafter.begin(prompt, entries.aux[:, :9], ids[:, 9], 20)
    drafter.advance(state, entries.aux[:, 9:10], ids[:, 10:11], torch.ones(2, dtype=torch.long))
    torch.testing.assert_close(drafter.norm(state.hidden[:, 0]), wanted[0], rtol=1e-4, atol=1e-5)
    one = torch.ones(2, 1, 1, dtype=torch.bool)
    hidden = drafter.expand(state, state.hidden, ids[:, 11:12], 1, one)
    torch.testing.assert_close(drafter.norm(hidden[:, 0]), wanted[1], rtol=1e-4, atol=1e-5)
    plain = along.states(
        drafter, entries._replace(positions=torch.arange(11).expand(2, -1)), along.paths(roots, path_of(ids, roots))
    )
    assert not torch.allclose(plain[:2, :, 0], wanted, atol=1e-3)


def test_log_probs_normalise_the_draft_vocabulary(drafter: Eagle3Drafter) -> None:
    hidden = torch.randn(3, 32)
    wanted = (drafter.norm(hidden) @ drafter.lm_head.weight.T).log_softmax(-1)
    torch.testing.assert_close(drafter.log_probs(hidden), wanted)


def test_parameter_names_are_those_of_eagle3_checkpoints(drafter: Eagle3Drafter) -> None:
    state = drafter.state_dict()
    assert set(state) == CHECKPOINT
    assert state["midlayer.self_attn.q_proj.weight"].shape == (32, 64)  # 2h wide
    assert state["midlayer.self_attn.k_proj.weight"].shape == (16, 64)
    assert state["fc.weight"].shape == (32, 96)
    assert state["lm_head.weight"].shape == (40, 32)
    assert (state["d2t"].dtype, state["t2d"].dtype) == (torch.int64, torch.bool)


def test_for_target_takes_the_targets_rotary_embedding(tiny_target: Target, drafter: Eagle3Drafter) -> None:
    theirs = tiny_target.model.model.rotary_emb.inv_freq
    torch.testing.assert_close(drafter.rotary_emb.inv_freq, theirs)
    assert drafter.config.target_fingerprint == tiny_target.fingerprint(LAYERS)
    wide = Eagle3Drafter.for_target(tiny_target, draft_vocabulary(torch.arange(9), 128, 9), intermediate_size=48)
    assert wide.midlayer.mlp.gate_proj.weight.shape == (48, 32)


def test_later_steps_of_fewer_roots_are_the_same(tiny_target: Target, drafter: Eagle3Drafter) -> None:
    ids, entries = inputs(tiny_target)
    roots = torch.tensor([[7, 2, 9, 4], [1, 8, 3, 3]])
    whole = along.paths(roots, path_of(ids, roots))
    widths = [4, 3, 1, 0]
    valid = torch.stack([torch.arange(4) < width for width in widths], -1).expand(2, -1, -1)  # longest paths first
    some = whole._replace(valid=valid)
    assert some.widths() == widths
    found, all_ = along.states(drafter, entries, some), along.states(drafter, entries, whole)
    for k, width in enumerate(widths):
        torch.testing.assert_close(found[k, :, :width], all_[k, :, :width], rtol=1e-5, atol=1e-6)
        assert not found[k, :, width:].any()


def test_default_feature_layers() -> None:
    assert default_layers(30) == (2, 15, 27)
    assert default_layers(6) == (2, 3, 3)
    assert default_layers(4) == (0, 2, 3)


def test_a_drafter_without_a_target_says_so(tiny_target: Target, drafter: Eagle3Drafter, tmp_path: Path) -> None:
    drafter.save_pretrained(tmp_path)
    ids, entries = inputs(tiny_target)
    roots = torch.tensor([[4], [6]])
    with pytest.raises(VSDError, match="call `attach` first"):
        along.states(Eagle3Drafter.from_pretrained(tmp_path), entries, along.paths(roots, path_of(ids, roots)))


def test_saved_and_loaded_bit_for_bit(drafter: Eagle3Drafter, tmp_path: Path) -> None:
    drafter.save_pretrained(tmp_path)
    again = Eagle3Drafter.from_pretrained(tmp_path)
    mine, theirs = drafter.state_dict(), again.state_dict()
    assert set(load_file(tmp_path / "model.safetensors")) == CHECKPOINT
    assert all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in mine)
    for name in ("aux_layers", "target_fingerprint", "draft_vocab_size", "rope_parameters", "num_key_value_heads"):
        assert getattr(again.config, name) == getattr(drafter.config, name), name
    assert torch.equal(again.vocabulary.ids, drafter.vocabulary.ids)
    buffers = dict(again.named_buffers())  # also what a checkpoint does not hold: the rotary frequencies
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in drafter.named_buffers())


def rewrite(folder: Path, change: dict[str, Tensor | None]) -> None:
    tensors = load_file(folder / "model.safetensors") | change
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"midlayer.hidden_norm.weight": None}, "midlayer.hidden_norm.weight"),
        ({"d2t": None}, "d2t"),
        ({"midlayer.q_norm.weight": torch.ones(8)}, "midlayer.q_norm.weight"),
        ({"fc.weight": torch.ones(32, 64)}, "fc.weight"),
    ],
    ids=["missing", "no d2t", "extra", "shape"],
)
def test_other_tensors_than_the_drafters_are_refused(
    drafter: Eagle3Drafter, tmp_path: Path, change: dict[str, Tensor | None], name: str
) -> None:
    drafter.save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(VSDError, match=name.replace(".", r"\.")):
        Eagle3Drafter.from_pretrained(tmp_path)


def test_folders_without_a_drafter_are_refused(tiny_target: Target, drafter: Eagle3Drafter, tmp_path: Path) -> None:
    with pytest.raises(VSDError, match="nowhere"):
        Eagle3Drafter.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(VSDError, match="empty"):
        Eagle3Drafter.from_pretrained(tmp_path / "empty")
    tiny_target.model.save_pretrained(tmp_path / "llama")
    with pytest.raises(VSDError, match="llama"):
        Eagle3Drafter.from_pretrained(tmp_path / "llama")
    drafter.save_pretrained(tmp_path / "torn")
    whole = (tmp_path / "torn" / "model.safetensors").read_bytes()
    (tmp_path / "torn" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VSDError, match="torn"):
        Eagle3Drafter.from_pretrained(tmp_path / "torn")


def test_nothing_is_unpickled(drafter: Eagle3Drafter, tmp_path: Path) -> None:
    drafter.save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(VSDError, match="cannot load a drafter"):
        Eagle3Drafter.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("vocab_size", 129, "vocabulary 128, not 129"),
        ("hidden_size", 64, "hidden size 32, not 64"),
        ("fingerprint", lambda layers: "another", "fingerprint .* not another"),
        ("config", SimpleNamespace(num_hidden_layers=3), r"aux_layers are \[0, 2, 3\], and the target has 3 layers"),
    ],
)
def test_another_target_is_refused_by_what_differs(
    tiny_target: Target, drafter: Eagle3Drafter, field: str, value: object, what: str
) -> None:
    same = {name: getattr(tiny_target, name) for name in ("vocab_size", "hidden_size", "fingerprint", "config")}
    drafter.attach(SimpleNamespace(**same))
    with pytest.raises(VSDError, match=what):
        drafter.attach(SimpleNamespace(**(same | {field: value})))


def test_a_drafter_of_unknown_origin_fits_any_target_of_its_sizes(tiny_target: Target, drafter: Eagle3Drafter) -> None:
    drafter.config.target_fingerprint = None
    drafter.attach(tiny_target)


def test_config_survives_json(tmp_path: Path) -> None:
    config = Eagle3Config(aux_layers=(1, 2, 3), target_hidden_size=48, rope_parameters=None)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    again = Eagle3Config.from_pretrained(tmp_path)
    assert (list(again.aux_layers), again.target_hidden_size) == ([1, 2, 3], 48)
