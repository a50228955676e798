"""What EAGLE-3 drafters embed at images: the placeholder (vLLM), or the target's own input embeddings (SGLang)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import along
import seeing
from vsd.decoding import Engine, Sampling
from vsd.drafters import draft_vocabulary, load_drafter, new_drafter
from vsd.drafters.load import read_drafter
from vsd.errors import MismatchError
from vsd.export import export_drafter
from vsd.paths import Entries, TreeShape
from vsd.targets import Padded, Target

PICTURES = [seeing.picture(n, 8 + 4 * n, 16) for n in range(2)]


@pytest.fixture(scope="module")
def target() -> Target:
    return seeing.target("llava")


def made(target: Target, family: str, rule: str, **options: Any) -> Any:
    torch.manual_seed(0)
    vocabulary = draft_vocabulary(torch.arange(15, 115), target.vocab_size, 100)
    return new_drafter(target, vocabulary, family, initializer_range=0.2, image_inputs=rule, **options).eval()


def entries(target: Target, drafter: Any) -> tuple[Padded, Entries]:
    """Of a text with two images and one without."""
    texts = [seeing.read(target, "a # b # cd", *PICTURES), seeing.read(target, "only text here")]
    padded = Padded.of([text.followed_by([20, 21, 22, 23]) for text in texts])
    return padded, Entries.of(padded, target.features(padded, drafter.needs.layers).aux)


@torch.no_grad()
@pytest.mark.parametrize("family", ["eagle3", "peagle"])
def test_embeddings_are_the_targets_inputs_one_to_the_left(target: Target, family: str) -> None:
    """A drafter by the other rule, made to embed the inputs of the whole text, drafts the same."""
    mine, other = made(target, family, "embeddings"), made(target, family, "placeholder")
    padded, found = entries(target, mine)
    roots = padded.lengths[:, None] - torch.tensor([4, 3])
    paths = along.paths(roots, torch.tensor([[[20, 21, 22], [30, 31, 32]]]).expand(2, -1, -1))
    ours = along.states(mine, found, paths)
    plain = found._replace(aux=entries(target, other)[1].aux)
    assert not torch.allclose(along.states(other, plain, paths)[:, 0], ours[:, 0], rtol=1e-3)
    inputs = target.features(padded, (0,)).aux
    text = (padded.ids != target.images.placeholder) & (torch.arange(padded.ids.shape[1]) < padded.lengths[:, None])
    torch.testing.assert_close(inputs[text], target.embed(padded.ids)[text])
    embed, given = other.embed, found.next_ids
    images = (given == target.images.placeholder)[..., None]
    whole = torch.where(images, inputs.roll(-1, dims=1), embed(given))
    other.embed = lambda ids: whole if ids is given else embed(ids)
    torch.testing.assert_close(along.states(other, plain, paths), ours)


@torch.no_grad()
def test_decoding_drafts_as_training(target: Target) -> None:
    """The first draft of a chain is the best token of the state at the root; answers are the target's own."""
    drafter = made(target, "eagle3", "embeddings")
    prompts = [seeing.read(target, "a # b # cd", *PICTURES), seeing.read(target, "only text here")]
    plain = [found.tokens for found in Engine(target).generate(prompts, Sampling(6, eos_ids=()))]
    engine = Engine(target, drafter, TreeShape.chain(2))
    assert [found.tokens for found in engine.generate(prompts, Sampling(6, eos_ids=()))] == plain
    padded = Padded.of(prompts)
    root = torch.tensor([tokens[0] for tokens in plain])
    aux = target.features(padded, drafter.needs.layers).aux
    state = drafter.begin(padded, aux, root, 64)
    drafted = drafter.propose(state, root, TreeShape.chain(2)).tokens
    found = Entries.of(padded, aux, root)
    states = along.states(drafter, found, along.paths(padded.lengths[:, None] - 1, torch.full((2, 1, 1), 20)))
    best = drafter.vocabulary.ids[drafter.lm_head(states[0, :, 0]).argmax(-1)]
    assert drafted[:, 1].tolist() == best.tolist()


def test_a_checkpoint_is_for_the_engine_that_reads_images_so(target: Target, tmp_path: Path) -> None:
    drafter = made(target, "eagle3", "embeddings", aux_layers=[1, 2, 3])
    with pytest.raises(MismatchError, match="export it for sglang"):
        export_drafter(drafter, target, tmp_path / "vllm", "vllm")
    native = export_drafter(drafter, target, tmp_path / "sglang", "sglang")
    assert json.loads((native / "config.json").read_text())["image_inputs"] == "embeddings"
    assert read_drafter(native, target).placeholder == target.images.placeholder
    drafter.save_pretrained(tmp_path / "own")
    assert load_drafter(tmp_path / "own", target).needs.layers[0] == 0


def test_rules_are_checked(target: Target, tiny_target: Target) -> None:
    with pytest.raises(MismatchError, match="placeholder or embeddings, not 'pixels'"):
        made(target, "eagle3", "pixels")
    with pytest.raises(MismatchError, match="is placeholder, not 'embeddings'"):
        made(target, "dflash", "embeddings")
    with pytest.raises(MismatchError, match="the target reads none"):
        made(tiny_target, "eagle3", "embeddings")
