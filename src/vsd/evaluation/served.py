"""`vsd bench --server`: a running engine beside this one, on the same prompts, at temperature 0.

Both engines draft chains of the same length with the same drafter, so that they accept the same tokens, and both give
the target's own answers. Where they do not, the drafter is served otherwise than it was trained: the first position at
which acceptance differs says where. Answers may differ where the target's two best tokens have nearly the same logit:
the engines add the same numbers in another order.

Acceptance counts all drafted tokens that a pass accepts, also those behind the end of an answer.

Legend: N prompts, K drafted tokens of a chain.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from vsd.data.pictures import as_request
from vsd.decoding import Engine, Result, Sampling
from vsd.drafters import Drafter
from vsd.errors import VSDError
from vsd.evaluation.answers import totals
from vsd.evaluation.bench import Talk, machine, versions
from vsd.evaluation.bootstrap import Counts, difference_interval, pooled_rate, rate_interval
from vsd.evaluation.prompts import Prompt
from vsd.evaluation.serving import ServedAnswer, Serving
from vsd.paths import TreeShape
from vsd.progress import track
from vsd.targets import Inputs, Padded, Target

_ENOUGH = 8  # prompts from which an interval over prompts says something


@dataclass
class Acceptance:
    """What one engine accepted; intervals are 95 %, over prompts.

    Attributes:
        length: 1 + accepted drafted tokens of a pass.
        per_position: share of passes that accepted at least 1, 2, …, K drafted tokens.
        tokens_per_second: wall clock of whole answers.
    """

    passes: int
    length: float
    length_ci: tuple[float, float]
    per_position: list[float]
    per_position_ci: list[tuple[float, float]]
    tokens_per_second: float


@dataclass
class Difference:
    """An answer that differs: the first position that does, from 0, and the tokens there (None: it has ended).

    Attributes:
        margin: by how much the target's best logit there exceeds the second.
        second: the server's token is the target's second.
    """

    prompt: str
    turn: int
    position: int
    here: int | None
    there: int | None
    margin: float
    second: bool


@dataclass
class _Side:
    """The answers of one engine: for each, the prompt's number, passes, and passes that accepted 1, 2, … or more."""

    prompts: list[int] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    accepted: list[list[int]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    def add(self, prompt: int, found: ServedAnswer, seconds: float) -> None:
        """One more answer."""
        self.prompts.append(prompt)
        self.passes.append(found.passes)
        self.accepted.append(found.accepted)
        self.tokens += len(found.tokens)
        self.seconds += seconds

    def counts(self) -> tuple[Counts, Counts]:
        """Passes that accepted at least 1, 2, … drafted tokens, [K, N], and all passes, [N], by prompt."""
        accepted = np.array([totals(self.prompts, at) for at in zip(*self.accepted)])
        return accepted, totals(self.prompts, self.passes)

    def summary(self) -> Acceptance:
        """Its numbers."""
        accepted, passes = self.counts()
        used = passes > 0
        accepted, passes = accepted[:, used], passes[used]
        every = passes + accepted.sum(0)
        return Acceptance(
            int(passes.sum()),
            pooled_rate(every, passes),
            rate_interval(every, passes),
            [pooled_rate(at, passes) for at in accepted],
            [rate_interval(at, passes) for at in accepted],
            self.tokens / self.seconds,
        )


def compare(
    target: Target,
    serving: Serving,
    prompts: Sequence[Prompt],
    drafter: Drafter | None = None,
    *,
    max_new_tokens: int = 128,
    progress: bool = True,
) -> dict[str, Any]:
    """Answer all prompts here and there; returns the content of `--json`.

    Args:
        drafter: the one that is served; None compares answers only.

    Raises:
        VSDError: every answer is a single token; or as in `Serving.answer`.
    """
    plain, sampling = Engine(target), Sampling(max_new_tokens)
    chain = None if drafter is None else Engine(target, drafter, TreeShape.chain(serving.depth))
    here, there, differences, count = _Side(), _Side(), list[Difference](), 0
    for n, prompt in enumerate(track(prompts, f"bench, beside {serving.name}", enabled=progress)):
        talk = Talk(target, prompt)
        for turn in range(len(prompt.turns)):
            asked = talk.ask(turn)
            chat = as_request(talk.history) if asked.extras else []
            (own,) = plain.generate([asked], sampling)
            talk.answered(own.tokens)
            start = time.perf_counter()
            served = serving.answer(asked.ids, chat, max_new_tokens)
            there.add(n, served, time.perf_counter() - start)
            if chain is not None:
                start = time.perf_counter()
                (result,) = chain.generate([asked], sampling)
                here.add(n, _counted(result, serving.depth), time.perf_counter() - start)
            count += 1
            if (found := first_difference(target, asked, own.tokens, served.tokens)) is not None:
                differences.append(Difference(prompt.id, turn, *found))
    if not any(there.passes) or (chain is not None and not any(here.passes)):
        raise VSDError("every answer ended with its first token: there was nothing to draft")
    return {
        "runs": [],
        "server": {
            "engine": serving.name,
            "depth": serving.depth,
            "acceptance": asdict(there.summary()),
            "here": asdict(here.summary()) if chain is not None else None,
            "difference": acceptance_difference(*there.counts(), *here.counts()) if chain is not None else None,
            "enough": len(prompts) >= _ENOUGH,
            "answers": count,
            "equal": 1 - len(differences) / count,
            "differences": [asdict(difference) for difference in differences],
        },
        "settings": {"max_new_tokens": max_new_tokens, "prompts": [p.id for p in prompts]},
        "versions": versions(),
        "machine": machine(target),
    }


def _counted(result: Result, depth: int) -> ServedAnswer:
    """An answer of this engine as a server counts it."""
    accepted = [sum(count >= k for count in result.accepted) for k in range(1, depth + 1)]
    return ServedAnswer(result.tokens, len(result.accepted), accepted)


def acceptance_difference(
    accepted: Counts, passes: Counts, base_accepted: Counts, base_passes: Counts
) -> dict[str, Any] | None:
    """The first position whose acceptance differs by more than chance, from 1; None if there is none.

    An interval over prompts of the difference of the shares excludes 0; its level is 1 - 0.05 / K, so that all
    positions together err in 5 % of comparisons of equal engines. Fewer than `_ENOUGH` prompts show nothing.

    Args:
        accepted, base_accepted: passes that accepted at least 1, 2, … drafted tokens, [K, N].
        passes, base_passes: all passes [N].
    """
    used = (passes > 0) & (base_passes > 0)
    if used.sum() < _ENOUGH:
        return None
    for k, (mine, base) in enumerate(zip(accepted, base_accepted), start=1):
        pair = mine[used], passes[used], base[used], base_passes[used]
        low, high = difference_interval(*pair, level=1 - 0.05 / len(accepted))
        if low > 0 or high < 0:
            return {"position": k, "difference": pooled_rate(*pair[:2]) - pooled_rate(*pair[2:]), "ci": (low, high)}
    return None


@torch.inference_mode()
def first_difference(
    target: Target, asked: Inputs, here: list[int], there: list[int]
) -> tuple[int, int | None, int | None, float, bool] | None:
    """The fields of `Difference` behind prompt and turn; None if the answers are equal up to an end-of-turn token."""
    if _without_end(here, target) == _without_end(there, target):
        return None
    shorter = min(len(here), len(there))
    first = next((i for i in range(shorter) if here[i] != there[i]), shorter)
    text = Padded.of([asked.followed_by(here[:first])], target.device)
    best = target.logits(target.features(text).hidden[0, -1]).topk(2)
    mine, other = (tokens[first] if first < len(tokens) else None for tokens in (here, there))
    return first, mine, other, float(best.values[0] - best.values[1]), other == int(best.indices[1])


def _without_end(tokens: list[int], target: Target) -> list[int]:
    return tokens[:-1] if tokens and tokens[-1] in target.eos_ids else tokens
