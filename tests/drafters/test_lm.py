"""A plain language model as a drafter: its states are its own logits, its checkpoints its own, its target checked."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import along
import tiny_run
from architectures import ARCHITECTURES
from vsd.data import Example
from vsd.drafters import draft_vocabulary, load_drafter, new_drafter
from vsd.drafters.load import read_drafter
from vsd.errors import VSDError
from vsd.paths import recorded
from vsd.targets import Target


def drafter_of(target: Target, **options: Any) -> Any:
    torch.manual_seed(1)
    vocabulary = draft_vocabulary(torch.arange(9), target.vocab_size, 9)
    return new_drafter(target, vocabulary, "lm", initializer_range=0.3, **options).eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_states_are_the_models_own(name: str) -> None:
    """Recorded paths and drafted ones, side by side: log q equals that of plain passes over plain sequences."""
    target = ARCHITECTURES[name]()
    drafter = drafter_of(target, num_hidden_layers=2)
    ids = torch.randint(15, 128, (2, 14), generator=torch.Generator().manual_seed(0))
    drafted, K = torch.tensor([[4, 5, 6, 9, 10], [3, 4, 5, 6, 7]]), 3
    text = recorded(ids, drafted, torch.ones_like(drafted, dtype=torch.bool), K)
    others = along.paths(drafted - 2, torch.randint(15, 128, (2, 5, K)))
    joined = text.joined([text, others])
    found = drafter(along.entries(target, ids, ()), joined, lambda states, head: states @ head.T)  # [K, B, 10, V]
    checked = 0
    for b in range(2):
        for p in range(10):
            root, tokens = int(joined.roots[b, p]), joined.tokens[b, p]
            plain = drafter.model(torch.cat([ids[b, : root + 2], tokens])[None]).logits[0, root + 1 : -1]
            for k in range(K):
                if bool(joined.valid[b, p, k]):
                    torch.testing.assert_close(found[k, b, p], plain[k], rtol=1e-3, atol=1e-3)
                    checked += 1
    assert checked > 40


def test_a_new_drafter_has_the_targets_ends(tiny_target: Target) -> None:
    drafter = drafter_of(tiny_target, num_hidden_layers=1)
    assert torch.equal(drafter.model.get_input_embeddings().weight, tiny_target.embedding_weight)
    assert torch.equal(drafter.lm_head.weight, tiny_target.head_weight)
    assert len(drafter.model.model.layers) == 1
    assert drafter.needs.layers == () and drafter.vocabulary.size == tiny_target.vocab_size
    with pytest.raises(VSDError, match="no field number_of_layers"):
        drafter_of(tiny_target, number_of_layers=1)
    with pytest.raises(
        VSDError, match="unknown drafter family 'ngram': choose eagle3, peagle, dflash, dflash2, dspark, vispec, lm"
    ):
        new_drafter(tiny_target, drafter.vocabulary, "ngram")


def test_a_checkpoint_is_the_plain_models(tiny_target: Target, tmp_path: Path) -> None:
    drafter = drafter_of(tiny_target)
    drafter.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(weight, drafter.state_dict()[name]) for name, weight in plain.state_dict().items())
    ids = torch.tensor([[40, 50, 60]])
    again = load_drafter(tmp_path, tiny_target)
    torch.testing.assert_close(again.model(ids).logits, drafter.model(ids).logits, rtol=1e-4, atol=1e-4)
    assert not any(weight.requires_grad for weight in again.parameters())


def test_a_model_that_changes_its_logits_is_refused(tmp_path: Path) -> None:
    target = ARCHITECTURES["gemma3"]()  # caps them
    tiny_run.write_target(target, tmp_path)
    with pytest.raises(VSDError, match="caps or scales its logits"):
        load_drafter(tmp_path, target)


def test_another_target_is_refused(tiny_target: Target, tmp_path: Path) -> None:
    drafter = drafter_of(tiny_target)
    drafter.save_pretrained(tmp_path)
    with pytest.raises(VSDError, match="trained for another target: fingerprint"):
        read_drafter(tmp_path, ARCHITECTURES["llama"]())
    drafter.config.vocab_size = 96
    with pytest.raises(VSDError, match="vocabulary of 96 tokens, the target 128"):
        drafter.attach(tiny_target)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("eagle3", {}),
        ("lk_lambda", {}),
        ("dpace", {}),
        ("vat", {}),
        ("griffin", {}),
        ("distillspec", {"samples": 4}),
        ("elbo", {"samples": 4}),
        ("vsd", {}),
        ("vsd", {"rule": "target", "e_step": "drafted", "samples": 4}),
        ("vsd", {"rule": "target", "e_step": "trees", "tree": "3x2x6"}),
        ("gto", {"tree": "3x2x6", "anchors": 4}),
    ],
)
def test_every_objective_trains_it(
    tiny_target: Target, examples: list[Example], tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    choice = {"objective": name, "objective_options": options, "max_steps": 2, "learning_rate": 1e-2}
    trainer = tiny_run.tiny_trainer(tiny_target, examples, tmp_path, family="lm", warmup_steps=0, **choice)
    start = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    assert all(bool(weight.isfinite().all()) for weight in trainer.model.parameters())
    assert any(not torch.equal(weight, start[name]) for name, weight in trainer.model.named_parameters())


@pytest.fixture(scope="module")
def examples(tiny_target: Target) -> list[Example]:
    return tiny_run.tiny_examples(tiny_target, 8)


def test_training_raises_acceptance_in_the_real_decoder(tiny_target: Target, tmp_path: Path) -> None:
    text = tiny_run.tiny_examples(tiny_target, 110, 32)
    options = {"learning_rate": 1e-2, "num_train_epochs": 8, "eval_max_new_tokens": 24}
    prompts = [tiny_run.prompt_of(example) for example in text[94:]]
    trainer = tiny_run.tiny_trainer(tiny_target, text[:94], tmp_path, family="lm", eval_prompts=prompts, **options)
    before = trainer.evaluate()["eval_tau"]
    trainer.train()
    after = trainer.evaluate()["eval_tau"]
    assert after > before + 0.3
