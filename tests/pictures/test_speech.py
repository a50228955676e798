"""Answers behind a picture: several in one pass are those of passes of their own."""

import pytest
import torch
from torch import Tensor

import tiny
from speech import Said, Speech
from vsd.targets import Target


@pytest.fixture
def speech(tiny_target: Target) -> Speech:
    return Speech(tiny_target.model, tiny_target.tokenizer)


SAID = [Said("What?", [40, 41, 42]), Said("Where is the moon?", [60]), Said("Why?", [33, 70])]


def test_branches_equal_separate_passes(speech: Speech) -> None:
    shown = torch.randn(5, 32)
    together = speech.log_probs(shown, SAID)
    torch.testing.assert_close(together, torch.cat([alone(speech, shown, said) for said in SAID]))


@torch.no_grad()
def alone(speech: Speech, shown: Tensor, said: Said) -> Tensor:
    before, behind = speech.prompt(said.question)
    embeds = torch.cat([speech.embed(before), shown, speech.embed(behind + said.answer)])
    logits = speech.language(inputs_embeds=embeds[None]).logits[0]
    return logits[-len(said.answer) - 1 : -1].log_softmax(-1)


def test_a_prompt_is_the_chat_template_around_the_picture(speech: Speech) -> None:
    before, behind = speech.prompt("What?")
    text = tiny.tiny_tokenizer().decode(before + behind)
    assert text == "<|im_start|>user\n\nWhat?<|im_end|>\n<|im_start|>assistant\n"


def test_what_is_shown_as_told_diverges_nowhere(speech: Speech) -> None:
    told = speech.caption("abc")
    assert float(speech.divergence(told, told, SAID)) == pytest.approx(0, abs=1e-6)
    assert float(speech.divergence(told.flip(0), told, SAID)) > 1e-4


def test_only_what_is_shown_has_gradients(speech: Speech) -> None:
    shown = torch.randn(5, 32, requires_grad=True)
    speech.cross_entropy(shown, SAID).backward()
    assert shown.grad is not None and bool((shown.grad.abs().sum(-1) > 0).all())
    assert all(parameter.grad is None for parameter in speech.language.parameters())
