"""`vsd bench`: plain decoding, transformers' `generate` and every drafter on the same prompts, in alternation.

All decoders answer each turn of each prompt one after another, in rotating order, one request at a time. A slower phase
of the machine therefore affects all decoders. In multi-turn prompts all decoders get the answers of plain decoding as
history.
"""

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from rich.progress import track

from vsd import __version__
from vsd.data import prompt_inputs
from vsd.decoding import Engine, Result, Sampling
from vsd.decoding.statistics import acceptance_length, acceptance_per_position
from vsd.drafters import Drafter
from vsd.errors import VSDError
from vsd.evaluation.bootstrap import pooled_rate, rate_interval, ratio_interval
from vsd.evaluation.prompts import Prompt
from vsd.paths import TreeShape
from vsd.targets import Inputs, Padded, Target


@dataclass
class Contender:
    """A measured drafter; plain decoding has neither name nor drafter."""

    name: str | None
    drafter: Drafter | None
    shape: TreeShape | None = None
    verification: str = "auto"


@dataclass
class Answers:
    """Measurements of one decoder: result and seconds of every turn; total seconds by kind of work.

    `prompts` and `suites` hold the prompt and the file of every turn.
    """

    prompts: list[int] = field(default_factory=list)
    suites: list[str] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    draft: float = 0.0
    verify: float = 0.0
    commit: float = 0.0
    prefill: float = 0.0

    def by_prompt(self, per_turn: Sequence[float]) -> np.ndarray:
        """Sums over the turns of each prompt, the unit of the bootstrap."""
        return np.bincount(self.prompts, weights=per_turn)

    def per_pass(self) -> tuple[np.ndarray, np.ndarray]:
        """(new tokens after prefill, verification passes) of every prompt."""
        tokens = self.by_prompt([sum(r.delivered) for r in self.results])
        return tokens, self.by_prompt([len(r.delivered) for r in self.results])

    def rate(self) -> tuple[np.ndarray, np.ndarray]:
        """(new tokens, seconds) of every prompt."""
        return self.by_prompt([len(r.tokens) for r in self.results]), self.by_prompt(self.seconds)


@dataclass
class Run:
    """Measurements of one drafter (null: plain decoding) at one temperature; intervals are 95 %, paired over prompts.

    Attributes:
        tau: new tokens per target forward, bonus token included, pooled over all passes after prefill.
        tokens_per_second: wall clock, prefill included.
        speedup: over plain decoding in this engine; `speedup_generate`: over transformers' `generate` of the same
            model, packed weights included (benchmarks/against.py compares with an unmodified model).
        acceptance_per_position: share of passes that accepted at least 1, 2, … drafted tokens.
        latency: milliseconds per pass to draft, verify and commit; milliseconds per prompt to prefill.
        identical: share of answers that equal plain decoding's, at temperature 0.
    """

    drafter: str | None
    temperature: float
    tree: dict[str, Any] | None
    verification: str
    tau: float
    tau_ci: tuple[float, float]
    tokens_per_second: float
    speedup: float
    speedup_ci: tuple[float, float]
    speedup_generate: float
    speedup_generate_ci: tuple[float, float]
    acceptance_per_position: list[float]
    latency: dict[str, float]
    tau_by_suite: dict[str, float]
    identical: float | None
    new_tokens: int


def bench(
    target: Target,
    contenders: Sequence[Contender],
    prompts: Sequence[Prompt],
    *,
    temperatures: Sequence[float] = (0.0,),
    max_new_tokens: int = 128,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure; returns the content of `--json`: `runs` (plain decoding first), versions, machine, settings.

    Raises:
        VSDError: every answer is a single token, so that nothing is drafted.
    """
    everyone = [Contender(None, None), *contenders]
    samplings = [Sampling(max_new_tokens, temperature, seed=seed) for temperature in temperatures]
    measured = [_measure(target, everyone, prompts, sampling, progress) for sampling in samplings]
    return {
        "runs": [asdict(run) for runs in measured for run in runs],
        "settings": {"max_new_tokens": max_new_tokens, "seed": seed, "prompts": [p.id for p in prompts]},
        "versions": {"vsd": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "machine": machine(target),
    }


def _measure(
    target: Target, everyone: Sequence[Contender], prompts: Sequence[Prompt], sampling: Sampling, progress: bool
) -> list[Run]:
    """Measure all contenders at one temperature."""
    engines = [Engine(target, c.drafter, c.shape, c.verification) for c in everyone]
    answers = [Answers() for _ in everyone]
    reference = Answers()
    _warm_up(engines, target, prompts, sampling)
    for n, prompt in enumerate(track(prompts, f"bench, temperature {sampling.temperature:g}", disable=not progress)):
        history = [{"role": "system", "content": prompt.system}] if prompt.system else []
        for turn in prompt.turns:
            history.append({"role": "user", "content": turn})
            asked = prompt_inputs(target.tokenizer, history, target.images)
            for done in (*answers, reference):
                done.prompts.append(n)
                done.suites.append(prompt.suite)
            for i in _rotated(len(engines) + 1, n):
                if i == len(engines):
                    _generate(target, asked, sampling, reference)
                else:
                    _decode(engines[i], asked, sampling, answers[i])
            text = target.tokenizer.decode(answers[0].results[-1].tokens, skip_special_tokens=True)
            history.append({"role": "assistant", "content": str(text).strip() or "…"})
    if not all(any(result.delivered for result in a.results) for a in answers):
        raise VSDError("every answer ended with its first token: there was nothing to draft")
    return [_run(c, a, answers[0], reference, sampling.temperature) for c, a in zip(everyone, answers)]


def machine(target: Target) -> dict[str, Any]:
    """Hardware, precision and Python version of the measurement."""
    gpu = target.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(target.device) if gpu else platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "dtype": str(target.model.dtype).removeprefix("torch."),
        "python": platform.python_version(),
    }


def _rotated(n: int, by: int) -> list[int]:
    return [(i + by) % n for i in range(n)]


def _warm_up(engines: list[Engine], target: Target, prompts: Sequence[Prompt], sampling: Sampling) -> None:
    """Run every engine once without timing, to compile kernels and fill allocators."""
    asked = prompt_inputs(target.tokenizer, [{"role": "user", "content": prompts[0].turns[0]}], target.images)
    short = Sampling(min(8, sampling.max_new_tokens), sampling.temperature)
    for engine in engines:
        _decode(engine, asked, short, Answers())
    _generate(target, asked, short, Answers())


def _decode(engine: Engine, asked: Inputs, sampling: Sampling, answers: Answers) -> None:
    result = Result(asked)
    start = time.perf_counter()
    for number, step in enumerate(engine.stream([result], sampling)):
        if number == 0:
            answers.prefill += step.verify
        else:
            answers.draft += step.draft
            answers.verify += step.verify
            answers.commit += step.commit
    answers.seconds.append(time.perf_counter() - start)
    answers.results.append(result)


def _generate(target: Target, asked: Inputs, sampling: Sampling, answers: Answers) -> None:
    """Answer the same request with transformers' `generate`."""
    config = transformers.GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampling.temperature > 0,
        temperature=sampling.temperature or None,
        top_k=0 if sampling.temperature > 0 else None,
        eos_token_id=list(target.eos_ids) or None,
        pad_token_id=next(iter(target.eos_ids), 0),
    )
    inputs = Padded.of([asked], target.device)
    extras = {"attention_mask": torch.ones_like(inputs.ids), **target.decoder.extras(inputs)}
    torch.manual_seed(sampling.seed)
    start = time.perf_counter()
    output = target.model.generate(inputs.ids, generation_config=config, **extras)
    new = output[0, len(asked.ids) :].tolist()
    answers.seconds.append(time.perf_counter() - start)
    answers.results.append(Result(asked, new))


def _run(contender: Contender, mine: Answers, plain: Answers, reference: Answers, temperature: float) -> Run:
    shape = contender.shape or TreeShape()
    tokens, passes = mine.per_pass()
    same = [a.tokens == b.tokens for a, b in zip(mine.results, plain.results)]
    split = {"draft": mine.draft, "verify": mine.verify, "commit": mine.commit}
    latency = {name: 1e3 * seconds / max(1, passes.sum()) for name, seconds in split.items()}
    rate = pooled_rate(*mine.rate())
    return Run(
        drafter=contender.name,
        temperature=temperature,
        tree=asdict(shape) if contender.drafter else None,
        verification=contender.verification,
        tau=acceptance_length(mine.results),
        tau_ci=rate_interval(tokens, passes),
        tokens_per_second=rate,
        speedup=rate / pooled_rate(*plain.rate()),
        speedup_ci=ratio_interval(*mine.rate(), *plain.rate()),
        speedup_generate=rate / pooled_rate(*reference.rate()),
        speedup_generate_ci=ratio_interval(*mine.rate(), *reference.rate()),
        acceptance_per_position=acceptance_per_position(mine.results, shape.depth) if contender.drafter else [],
        latency={**latency, "prefill": 1e3 * mine.prefill / len(mine.results)},
        tau_by_suite={
            suite: acceptance_length([r for r, s in zip(mine.results, mine.suites) if s == suite])
            for suite in dict.fromkeys(s for r, s in zip(mine.results, mine.suites) if r.delivered)
        },
        identical=sum(same) / len(same) if temperature == 0 else None,
        new_tokens=sum(len(result.tokens) for result in mine.results),
    )
