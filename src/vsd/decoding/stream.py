"""`vsd generate`: print an answer while it is decoded, drafted tokens in green, then the acceptance statistics."""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from vsd.data import prompt_inputs
from vsd.decoding.engine import Engine, Result
from vsd.decoding.sampling import Sampling
from vsd.decoding.statistics import acceptance_length
from vsd.drafters import Drafter
from vsd.paths import TreeShape
from vsd.targets import Target
from vsd.targets.images import Picture


def answer(
    target: Target,
    drafter: Drafter | None,
    shape: TreeShape,
    prompt: str,
    sampling: Sampling,
    *,
    system: str | None = None,
    pictures: Sequence[Picture] = (),
    verification: str = "auto",
    console: Console | None = None,
) -> Result:
    """Stream the answer to one user message, about pictures or not, to the console."""
    console = console or Console(highlight=False)
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    shown = [{"type": "image", "image": picture} for picture in pictures]
    content = [*shown, {"type": "text", "text": prompt}] if shown else prompt
    asked = prompt_inputs(target.tokenizer, [*messages, {"role": "user", "content": content}], target.images)
    engine = Engine(target, drafter, shape, verification)
    result, start = Result(asked), time.perf_counter()
    steps = (step.tokens.get(0, []) for step in engine.stream([result], sampling))
    for text, drafted in pieces(target, steps):
        console.print(Text(text, style="green" if drafted else ""), end="", soft_wrap=True)
    seconds = time.perf_counter() - start
    summary = f"{len(result.tokens)} tokens, {len(result.tokens) / seconds:.1f}/s"
    if (drafter is not None or shape.lookup) and result.delivered:
        summary += (
            f", τ = {acceptance_length([result]):.2f}: {sum(result.accepted)} drafted tokens accepted "
            f"in {len(result.delivered)} target passes"
        )
    console.print(f"\n\n[dim]{summary}[/dim]")
    return result


def pieces(target: Target, steps: Iterable[list[int]]) -> Iterator[tuple[str, bool]]:
    """(text, drafted or not) of every token, from the tokens of each pass; the last token of a pass is the bonus.

    A character that spans several tokens is yielded with the last of these tokens.
    """
    tokens: list[int] = []
    shown = ""
    for step in steps:
        for i, token in enumerate(step):
            tokens.append(token)
            text = str(target.tokenizer.decode(tokens, skip_special_tokens=True))
            if not text.endswith("\ufffd") and len(text) > len(shown):
                yield text[len(shown) :], i < len(step) - 1
                shown = text
