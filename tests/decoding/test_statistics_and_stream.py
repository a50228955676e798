"""What is reported of an answer, and how it is printed."""

import io
import math
from types import SimpleNamespace

import pytest
from rich.console import Console

import tiny
from overfit import random_drafter
from vsd.data import prompt_inputs
from vsd.decoding import Engine, Result, Sampling
from vsd.decoding.statistics import acceptance_length, acceptance_per_position
from vsd.decoding.stream import answer, pieces
from vsd.paths import TreeShape
from vsd.targets import Inputs


def test_acceptance_by_hand() -> None:
    """Five passes deliver 3 + 1 + 2 + 1 + 1 tokens; the last pass of the second answer accepted two it cut off."""
    results = [
        Result(Inputs([1]), tokens=[0] * 7, accepted=[2, 0, 1], delivered=[3, 1, 2]),
        Result(Inputs([1]), tokens=[0] * 3, accepted=[0, 2], delivered=[1, 1]),
        Result(Inputs([1]), tokens=[0]),
    ]
    assert acceptance_length(results) == pytest.approx(8 / 5)
    assert acceptance_per_position(results, 3) == pytest.approx([3 / 5, 2 / 5, 0])
    assert math.isnan(acceptance_length([])) and acceptance_per_position([], 2) == [0.0, 0.0]


def test_plain_decoding_has_acceptance_length_one() -> None:
    results = Engine(tiny.tiny_target()).generate([[30, 31], [40]], Sampling(6, eos_ids=()))
    assert acceptance_length(results) == 1.0 and acceptance_per_position(results, 1) == [0.0]


class Bytes:
    """A tokenizer of UTF-8 bytes; 256 is a special token."""

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        special = b"" if skip_special_tokens else b"<eos>"
        return b"".join(special if t == 256 else bytes([t]) for t in tokens).decode("utf-8", errors="replace")


def test_pieces_never_split_a_character() -> None:
    """The euro sign (three bytes) is spread over two passes; the accented letter ends in a drafted token."""
    target = SimpleNamespace(tokenizer=Bytes())
    euro, accented = list("€".encode()), list("é".encode())
    steps = [[ord("a"), euro[0]], [euro[1], euro[2], ord("b")], [], [*accented, ord("!"), 256]]
    found = list(pieces(target, steps))  # type: ignore[arg-type]
    assert found == [("a", True), ("€", True), ("b", False), ("é", True), ("!", True)]


def test_pieces_of_plain_decoding_are_the_targets() -> None:
    target = SimpleNamespace(tokenizer=Bytes())
    assert list(pieces(target, [[104], [105]])) == [("h", False), ("i", False)]  # type: ignore[arg-type]


@pytest.mark.parametrize("drafting", [True, False])
def test_answer_prints_the_text_and_a_summary(drafting: bool) -> None:
    target = tiny.tiny_target()
    out = io.StringIO()
    console = Console(file=out, width=200, highlight=False)
    drafter = random_drafter(target) if drafting else None
    shape = TreeShape(3, 2, 6)
    result = answer(target, drafter, shape, "Hello?", Sampling(12), system="Be brief.", console=console)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
    assert result.prompt.ids == prompt_inputs(target.tokenizer, messages).ids
    expected = Engine(target, drafter, shape).generate([result.prompt], Sampling(12))[0]
    assert result.tokens == expected.tokens
    printed = out.getvalue()
    assert printed.startswith(target.tokenizer.decode(result.tokens, skip_special_tokens=True))
    assert f"\n\n{len(result.tokens)} tokens, " in printed
    assert ("τ = " in printed) == drafting
    if drafting:
        assert f"{sum(result.accepted)} drafted tokens accepted in {len(result.delivered)} target passes" in printed
