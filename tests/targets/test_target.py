"""What the drafter and the verifier read from a target equals what the model computes for plain sequences."""

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CohereConfig, GPT2Config, GraniteConfig, LlamaConfig, LlamaForCausalLM, Qwen3NextConfig

import tiny
from architectures import ARCHITECTURES, SIZES, build, llama
from vsd.errors import VSDError
from vsd.paths import ancestors
from vsd.targets import Inputs, Output, Padded, Target
from vsd.targets.attention import grouped_attention
from vsd.targets.packed import pack_linears

LAYERS = (0, 2, 3)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # hidden states are of order 1; a wrong mask or position moves them by 0.01 to 1


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def target(request: pytest.FixtureRequest) -> Target:
    return ARCHITECTURES[request.param]()


def tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(15, tiny.VOCAB) for _ in range(count)]


def padded(*rows: list[int]) -> Padded:
    return Padded.of([Inputs(row) for row in rows])


@torch.no_grad()
def plain(target: Target, ids: list[int], layers: tuple[int, ...] = LAYERS) -> Output:
    """A plain pass of the model over one sequence, with the model's own positions, masks and hidden states."""
    output = target.model(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    aux = torch.cat([output.hidden_states[i] for i in layers], dim=-1)
    return Output(output.hidden_states[-1][0], aux[0])


@torch.no_grad()
def test_features_and_logits_are_the_models_own(target: Target) -> None:
    rng = random.Random(0)
    rows = [tokens(rng, n) for n in (20, 7, 1, 13)]
    inputs = padded(*rows)
    ids, lengths = inputs.ids, inputs.lengths
    hidden, aux = target.features(inputs, LAYERS)
    assert aux.shape == (4, 20, 3 * target.hidden_size)
    for b, row in enumerate(rows):
        own = plain(target, row)
        torch.testing.assert_close(hidden[b, : lengths[b]], own.hidden, **CLOSE)
        torch.testing.assert_close(aux[b, : lengths[b]], own.aux, **CLOSE)
        logits = target.model(torch.tensor([row])).logits[0]
        torch.testing.assert_close(target.logits(hidden[b, : lengths[b]]), logits, **CLOSE)
    torch.testing.assert_close(target.embed(ids)[0], target.model.get_input_embeddings()(torch.tensor(rows[0])))


def random_forest(rng: random.Random, rows: int, nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, parents and depths [rows, nodes] of random trees, parents before children."""
    parents = torch.tensor([[0] + [rng.randrange(i) for i in range(1, nodes)] for _ in range(rows)])
    depths = torch.zeros_like(parents)
    for i in range(1, nodes):
        depths[:, i] = 1 + depths.gather(1, parents[:, i : i + 1])[:, 0]
    return torch.tensor([tokens(rng, nodes) for _ in range(rows)]), parents, depths


def path_to(node: int, parents: list[int]) -> list[int]:
    """Nodes from the root to `node`."""
    path = [node]
    while path[0] != 0:
        path.insert(0, parents[path[0]])
    return path


def test_tree_passes_equal_plain_sequences(target: Target) -> None:
    """Three passes over a ragged batch; after each some path is committed, after the second rows leave."""
    rng = random.Random(1)
    sequences = [tokens(rng, n) for n in (9, 4, 14, 1)]
    inputs = padded(*sequences)
    lengths = inputs.lengths
    cache = target.new_cache(len(sequences), capacity=20)  # smaller than needed: it grows
    prefilled = target.prefill(inputs, cache, LAYERS)
    for b, sequence in enumerate(sequences):
        torch.testing.assert_close(prefilled.hidden[b, : lengths[b]], plain(target, sequence).hidden, **CLOSE)
    for turn in range(3):
        nodes, parents, depths = random_forest(rng, len(sequences), nodes=9)
        above = ancestors(parents, int(depths.max()))
        hidden, aux = target.forward(nodes, cache.next[:, None] + depths, above, cache, layers=LAYERS)
        accepted = []
        for b, sequence in enumerate(sequences):
            for node in range(9):
                path = nodes[b, path_to(node, parents[b].tolist())].tolist()
                own = plain(target, sequence + path)
                torch.testing.assert_close(hidden[b, node], own.hidden[-1], **CLOSE)
                torch.testing.assert_close(aux[b, node], own.aux[-1], **CLOSE)
            accepted.append(path_to(rng.randrange(9), parents[b].tolist()))
        kept = padded(*accepted)
        cache.commit(kept.ids, kept.lengths)
        sequences = [s + nodes[b, accepted[b]].tolist() for b, s in enumerate(sequences)]
        assert cache.lengths.tolist() == cache.next.tolist() == [len(s) for s in sequences]
        for b, sequence in enumerate(sequences):
            assert cache.slots.positions[b, : len(sequence)].tolist() == list(range(len(sequence)))
        if turn == 1:
            cache.select(torch.tensor([3, 1]))
            sequences = [sequences[3], sequences[1]]
            assert cache.slots.fill == max(map(len, sequences))


class Squares(TorchDispatchMode):
    """Counts results [..., N, N] of operations: masks, and scores of attention."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            self.count += isinstance(x, Tensor) and x.shape[-2:] == (self.size, self.size)
        return out


def test_prefill_equals_a_pass_under_a_dense_causal_mask(target: Target) -> None:
    """Outputs, padding included, and what a later pass reads from the cache."""
    rng, caches = random.Random(6), (target.new_cache(3, 30), target.new_cache(3, 30))
    inputs = padded(*(tokens(rng, n) for n in (19, 7, 1)))
    causal = torch.ones(1, 19, 19, dtype=torch.bool).tril()
    dense = target.forward(inputs.ids, inputs.positions, causal, caches[1], layers=LAYERS)
    caches[1].commit(torch.arange(19).expand(3, -1), inputs.lengths)
    found = target.prefill(inputs, caches[0], LAYERS)
    torch.testing.assert_close(found.hidden, dense.hidden, **CLOSE)
    torch.testing.assert_close(found.aux, dense.aux, **CLOSE)
    nodes, above = torch.tensor([tokens(rng, 2)] * 3), torch.ones(1, 2, 2, dtype=torch.bool).tril()
    later = [target.forward(nodes, c.next[:, None] + torch.arange(2), above, c).hidden for c in caches]
    torch.testing.assert_close(*later, **CLOSE)
    assert torch.equal(caches[0].slots.positions, caches[1].slots.positions)


def test_prefill_builds_masks_for_sliding_layers_alone(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    masked: list[bool] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, attn_mask: Tensor | None = None, is_causal: bool = False, **options: Any) -> Tensor:
        masked.append(attn_mask is not None)
        assert is_causal == (attn_mask is None)
        return attend(*args, attn_mask=attn_mask, is_causal=is_causal, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    window = target.decoder.window is not None
    kinds = getattr(target.config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * 4
    with Squares(19) as squares:
        target.prefill(padded(tokens(random.Random(7), 19), [20, 21]), target.new_cache(2, 19))
    assert masked == [kind == "sliding_attention" for kind in kinds]
    assert bool(squares.count) == any(masked)


@pytest.mark.parametrize("rows", [[0, 2], [3, 1], [2, 2, 0, 0], [1, 1, 1, 3, 0, 2]])
def test_rows_that_stay_keep_their_own_tokens(rows: list[int]) -> None:
    """Rows leave, change places or are repeated; another pass, which makes the cache grow, equals plain sequences."""
    target, rng = llama(), random.Random(8)
    sequences = [tokens(rng, n) for n in (9, 4, 14, 1)]
    cache = target.new_cache(4, capacity=15)
    target.prefill(padded(*sequences), cache)
    cache.select(torch.tensor(rows))
    nodes, above = torch.tensor([tokens(rng, 3) for _ in rows]), torch.ones(1, 3, 3, dtype=torch.bool).tril()
    hidden = target.forward(nodes, cache.next[:, None] + torch.arange(3), above, cache).hidden
    for b, row in enumerate(rows):
        whole = sequences[row] + nodes[b].tolist()
        torch.testing.assert_close(hidden[b], plain(target, whole).hidden[-3:], **CLOSE)


def test_rows_that_leave_cost_no_copy_of_unused_slots() -> None:
    """The cache stays in its memory, and what moves are committed slots."""
    target = llama()
    cache = target.new_cache(3, capacity=100)
    target.prefill(padded(*([20] * n for n in (5, 7, 3))), cache)
    (kept,) = cache.slots.stores
    before, small = kept.keys.untyped_storage().data_ptr(), 2 * 4 * 2 * 7 * 8  # numbers of two rows' seven slots

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            assert not func.__name__.startswith(("index.", "copy_", "clone")) or out.numel() <= small
            return out

    with Sizes():
        cache.select(torch.tensor([1, 2]))
    assert kept.keys.shape[1] == 2 and kept.keys.untyped_storage().data_ptr() == before


@pytest.mark.parametrize(
    ("name", "static"), [("llama", True), ("llama", False), ("gemma3", True), ("mistral", False), ("phi", True)]
)
def test_compiled_passes_equal_plain_ones_and_are_compiled_once(name: str, static: bool) -> None:
    """One unbroken graph for all contexts, if static for each number of nodes; the same answers from the same cache."""
    target, compiled, graphs = ARCHITECTURES[name](), ARCHITECTURES[name](), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled.compile(static, backend=backend, fullgraph=True)
    rng, caches = random.Random(2), []
    inputs = padded(*(tokens(rng, n) for n in (9, 4)))
    for one in (target, compiled):
        caches.append(one.new_cache(2, capacity=40))
        one.prefill(inputs, caches[-1])
    for count in (5, 5, 3, 5, 3):
        nodes, parents, depths = random_forest(rng, 2, count)
        above = ancestors(parents, int(depths.max()))
        found = [
            one.forward(nodes, cache.next[:, None] + depths, above, cache, layers=(*LAYERS, 4))
            for one, cache in zip((target, compiled), caches)
        ]
        torch.testing.assert_close(found[1].hidden, found[0].hidden, **CLOSE)
        torch.testing.assert_close(found[1].aux, found[0].aux, **CLOSE)
        for cache in caches:
            cache.commit(torch.tensor([[0, 1], [0, 2]]), torch.tensor([2, 1]))
    assert len(graphs) == (2 if static else 1)


def test_packed_weights_are_not_compiled() -> None:
    target = ARCHITECTURES["llama"]()
    pack_linears(target.model)
    with pytest.raises(VSDError, match="pack=False"):
        target.compile()


@pytest.mark.parametrize("name", ["gemma3", "mistral"])
def test_windows_matter_in_these_tests(name: str) -> None:
    """The sliding windows above are really shorter than the sequences: without them, the output differs."""
    target = ARCHITECTURES[name]()
    row = tokens(random.Random(2), 20)
    inputs, causal = padded(row), torch.ones(1, 20, 20, dtype=torch.bool).tril()
    windowed = target.features(inputs).hidden
    decoder = target.decoder
    torch.testing.assert_close(decoder.packed(inputs.ids, inputs.positions, causal).hidden, windowed, **CLOSE)
    decoder.window = 1000
    full = decoder.packed(inputs.ids, inputs.positions, causal).hidden
    assert (full - windowed)[0, -1].abs().max() > 0.05
    torch.testing.assert_close(full[:, :5], windowed[:, :5], **CLOSE)


def test_packed_linears_equal_plain_ones() -> None:
    for name in ("llama", "phi"):  # without and with biases
        target = ARCHITECTURES[name]()
        inputs = padded(tokens(random.Random(3), 11))
        before = target.features(inputs, LAYERS)
        logits = target.logits(before.hidden)
        fingerprint = target.fingerprint()
        plain_linears = sum(type(m) is torch.nn.Linear for m in target.model.modules())
        assert pack_linears(target.model) == plain_linears
        assert not any(type(m) is torch.nn.Linear for m in target.model.modules())
        after = target.features(inputs, LAYERS)
        torch.testing.assert_close(after.hidden, before.hidden, **CLOSE)
        torch.testing.assert_close(after.aux, before.aux, **CLOSE)
        torch.testing.assert_close(target.logits(after.hidden), logits, **CLOSE)
        assert target.fingerprint() == fingerprint
        assert target.head_weight.shape == (tiny.VOCAB, 32)


def test_joint_layers_answer_in_any_order() -> None:
    """Each for its own input, whoever is asked, however often, and nothing is kept when all have answered."""
    torch.manual_seed(0)
    names = ("q_proj", "k_proj", "v_proj")
    plain = torch.nn.ModuleDict({name: torch.nn.Linear(8, n) for name, n in zip(names, (16, 8, 24))})
    joint = copy.deepcopy(plain)
    assert pack_linears(joint) == 3
    x, y = torch.randn(2, 5, 8), torch.randn(1, 8)
    for name, given in (("q_proj", x), ("v_proj", y), ("v_proj", y), ("k_proj", y), ("q_proj", x), ("k_proj", x)):
        torch.testing.assert_close(joint[name](given), plain[name](given), **CLOSE)
    assert joint["v_proj"](x).shape == (2, 5, 24) and joint["q_proj"].joint.input is None


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_grouped_attention_is_attention(groups: int, scaling: float | None) -> None:
    torch.manual_seed(0)
    B, G, N, L, D = 2, 2, 5, 11, 4
    query, key, value = torch.randn(B, N, G * groups, D).transpose(1, 2), *torch.randn(2, B, G, L, D)
    mask = torch.zeros(B, 1, N, L).masked_fill(torch.rand(B, 1, N, L) < 0.5, torch.finfo(torch.float32).min)
    found, _ = grouped_attention(torch.nn.Module(), query, key, value, mask, scaling=scaling)
    for h in range(G * groups):
        scores = query[:, h] @ key[:, h // groups].mT * (scaling or D**-0.5) + mask[:, 0]
        torch.testing.assert_close(found[:, :, h], scores.softmax(-1) @ value[:, h // groups], **CLOSE)


def test_packed_linears_leave_alone_what_they_cannot_pack() -> None:
    model = torch.nn.ModuleDict({"sixteen": torch.nn.Linear(4, 4).half(), "norm": torch.nn.LayerNorm(4)})
    assert pack_linears(model) == 0


def test_unknown_attention_is_refused() -> None:
    config = Qwen3NextConfig(**SIZES, num_key_value_heads=2, head_dim=8, num_experts=4, moe_intermediate_size=16)
    with pytest.raises(VSDError, match="linear_attention"):
        build(config)
    target = llama()
    target.model.config.layer_types = ["chunked_attention", "full_attention"]
    with pytest.raises(VSDError, match="chunked_attention"):
        Target(target.model, target.tokenizer)


@pytest.mark.parametrize(
    "config",
    [CohereConfig(**SIZES, logit_scale=0.25), GraniteConfig(**SIZES, logits_scaling=4.0)],
    ids=lambda c: c.model_type,
)
def test_heads_that_scale_their_logits_are_refused(config: LlamaConfig) -> None:
    with pytest.raises(VSDError, match="logits"):
        build(config)


def test_a_model_whose_forward_does_more_is_refused() -> None:
    class Cooled(LlamaForCausalLM):
        def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 0.5
            return output

    torch.manual_seed(0)
    model = Cooled(LlamaConfig(**SIZES, num_key_value_heads=2))
    with pytest.raises(VSDError, match="Cooled"):
        Target(model, tiny.tiny_tokenizer())


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(VSDError, match="no LM head"):
        Target(llama().model.model, tiny.tiny_tokenizer())


def test_a_pass_yields_the_layers_it_is_asked_for() -> None:
    target, row = llama(), tokens(random.Random(4), 6)
    for layers in ((1, 3), (0,), (0, 4), ()):  # behind the four layers the LM head reads
        aux = target.features(padded(row), layers).aux
        assert aux.shape == (1, 6, 32 * len(layers))
        if layers:
            torch.testing.assert_close(aux[0], plain(target, row, layers).aux)
    target.check_layers((0, 3))
    with pytest.raises(VSDError, match=r"layers \[1, 4\] of a target that has 4"):
        target.check_layers((1, 4))


def test_fingerprint_changes_with_weights_and_features_only() -> None:
    first = llama()
    model, tokenizer = first.model, first.tokenizer
    assert llama().fingerprint() == first.fingerprint()
    assert first.fingerprint((0, 1, 2)) != first.fingerprint() != first.fingerprint((1, 2))
    assert build(LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=8), seed=1).fingerprint() != first.fingerprint()
    assert Target(llama().model.bfloat16(), tokenizer).fingerprint() == first.fingerprint()
    for weight in (
        model.lm_head.weight,
        model.model.embed_tokens.weight,
        model.model.layers[-1].input_layernorm.weight,
    ):
        before = weight.detach().clone()
        with torch.no_grad():
            weight *= 1.1
        assert Target(model, tokenizer).fingerprint() != first.fingerprint()
        with torch.no_grad():
            weight.copy_(before)
    assert Target(model, tokenizer).fingerprint() == first.fingerprint()


def test_target_is_frozen_and_knows_where_answers_end() -> None:
    target = llama()
    assert not any(p.requires_grad for p in target.model.parameters()) and not target.model.training
    target.model.generation_config.eos_token_id = [2, 4]
    assert Target(target.model, target.tokenizer).eos_ids == (2, 4)
    target.model.generation_config.eos_token_id = None
    assert Target(target.model, target.tokenizer).eos_ids == (target.tokenizer.eos_token_id,)


def test_learned_positions_work() -> None:
    target = build(GPT2Config(**SIZES))
    row = tokens(random.Random(5), 12)
    torch.testing.assert_close(target.features(padded(row)).hidden[0], plain(target, row).hidden, **CLOSE)
