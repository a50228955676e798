"""`vsd bench`: plain decoding, transformers' `generate` and every drafter on the same prompts, in alternation.

All decoders answer each turn of each prompt one after another, in rotating order. A slower phase of the machine
therefore affects all decoders. With several concurrencies each part of the prompts is answered at all of them in turn,
for the same reason. In multi-turn prompts all decoders get the answers of plain decoding as history.
"""

import platform
import time
from collections.abc import Container, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import transformers

from vsd import __version__
from vsd.data import prompt_inputs
from vsd.decoding import Engine, Result, Sampling
from vsd.decoding.statistics import acceptance_length, acceptance_per_position
from vsd.drafters import Drafter
from vsd.errors import ConfigurationError, VSDError
from vsd.evaluation.answers import Answers
from vsd.evaluation.bootstrap import pooled_rate, rate_interval, ratio_interval
from vsd.evaluation.breakdown import Passes, by_answer, by_context, by_position, by_slice, samples
from vsd.evaluation.plain import neutral
from vsd.evaluation.prompts import Prompt, has_images
from vsd.paths import TreeShape
from vsd.progress import Progress
from vsd.targets import Inputs, Padded, Target


@dataclass
class Contender:
    """A measured drafter; plain decoding has neither name nor drafter.

    Attributes:
        trained: longest text it was trained with, in tokens; None: unknown.
    """

    name: str | None
    drafter: Drafter | None
    shape: TreeShape | None = None
    verification: str = "auto"
    trained: int | None = None


@dataclass
class Run:
    """Measurements of one drafter (null: plain decoding) at one temperature; intervals are 95 %, paired over prompts.

    Speed is that of the first concurrency; its intervals are over groups of prompts that are decoded together.

    Attributes:
        tau: new tokens per target forward, bonus token included, pooled over all passes after prefill.
        tokens_per_second: wall clock, prefill included.
        speedup: over plain decoding in this engine; `speedup_generate`: over transformers' `generate` of the same
            model, packed weights included (benchmarks/against.py compares with an unmodified model).
        acceptance_per_position: share of passes that accepted at least 1, 2, … drafted tokens.
        slices: τ by field and value: the file of the prompts, their labels, and whether they have images.
        by_context: τ by the length of prompt and answer before a pass, from ≤ length < to.
        by_answer: τ by the length of the whole answer, likewise.
        by_concurrency: τ and speed by number of prompts decoded together.
        trained_length: longest text in the drafter's training, in tokens; null if unknown.
        samples: answers in runs of text: [text, drafted and accepted].
        latency: milliseconds per target pass to draft, verify and commit; milliseconds per prompt to prefill.
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
    acceptance_per_position_ci: list[tuple[float, float]]
    slices: dict[str, dict[str, Any]]
    by_context: list[dict[str, Any]]
    by_answer: list[dict[str, Any]]
    by_concurrency: list[dict[str, Any]]
    trained_length: int | None
    samples: list[dict[str, Any]]
    latency: dict[str, float]
    identical: float | None
    new_tokens: int


class Measured(NamedTuple):
    """Answers at one temperature and one concurrency: of all contenders, plain decoding first, and of `generate`."""

    answers: list[Answers]
    reference: Answers


def bench(
    target: Target,
    contenders: Sequence[Contender],
    prompts: Sequence[Prompt],
    *,
    temperatures: Sequence[float] = (0.0,),
    concurrency: Sequence[int] = (1,),
    max_new_tokens: int = 128,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure; returns the content of `--json`: `runs` (plain decoding first), versions, machine, settings.

    Args:
        concurrency: numbers of prompts decoded together, each measured; the first gives the runs' own numbers.

    Raises:
        VSDError: every answer is a single token, so that nothing is drafted.
    """
    everyone = [Contender(None, None), *contenders]
    runs = []
    for temperature in temperatures:
        sampling = Sampling(max_new_tokens, temperature, seed=seed)
        measured = measure(target, everyone, prompts, sampling, concurrency, progress)
        runs += [_run(target, prompts, c, i, measured, temperature) for i, c in enumerate(everyone)]
    settings = {"max_new_tokens": max_new_tokens, "seed": seed, "concurrency": list(concurrency)}
    return {
        "runs": [asdict(run) for run in runs],
        "settings": {**settings, "prompts": [p.id for p in prompts]},
        "versions": versions(),
        "machine": machine(target),
    }


def measure(
    target: Target,
    everyone: Sequence[Contender],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    concurrency: Sequence[int] = (1,),
    progress: bool = True,
) -> dict[int, Measured]:
    """The answers of all contenders, plain decoding first, by concurrency.

    Raises:
        VSDError: every answer is a single token, so that nothing is drafted.
    """
    if not concurrency or min(concurrency) < 1:
        raise ConfigurationError(f"concurrency is a number of prompts, 1 or more, not {min(concurrency, default=0)}")
    engines = [Engine(target, c.drafter, c.shape, c.verification) for c in everyone]
    if max(concurrency) > 1 and any(map(has_images, prompts)):
        raise ConfigurationError("prompts with images are measured one at a time: use concurrency 1")
    found = {size: Measured([Answers() for _ in everyone], Answers()) for size in concurrency}
    _warm_up(engines, target, prompts, sampling, concurrency)
    talks = [Talk(target, prompt) for prompt in prompts]
    with Progress(disable=not progress) as bar:
        task = bar.add_task(f"bench, temperature {sampling.temperature:g}", total=len(prompts))
        for part in _parts(range(len(prompts)), max(concurrency)):
            for size, measured in found.items():
                for group in _parts(part, size):
                    _answer(target, engines, talks, group, sampling, measured)
            bar.advance(task, len(part))
    if not all(any(result.delivered for result in a.results) for m in found.values() for a in m.answers):
        raise VSDError("every answer ended with its first token: there was nothing to draft")
    return found


class Talk:
    """The conversation of one prompt; the answers of plain decoding are its history."""

    def __init__(self, target: Target, prompt: Prompt) -> None:
        self.target, self.turns = target, prompt.turns
        self.history = [{"role": "system", "content": prompt.system}] if prompt.system else []
        self.asked: list[Inputs] = []

    def ask(self, turn: int) -> Inputs:
        """The inputs of a turn, the same every time."""
        if turn == len(self.asked):
            self.history.append({"role": "user", "content": self.turns[turn]})
            self.asked.append(prompt_inputs(self.target.tokenizer, self.history, self.target.images))
        return self.asked[turn]

    def answered(self, tokens: list[int]) -> None:
        """Plain decoding's answer to the last turn; only the first one counts."""
        if self.history[-1]["role"] == "user":
            text = self.target.tokenizer.decode(tokens, skip_special_tokens=True)
            self.history.append({"role": "assistant", "content": str(text).strip() or "…"})


def _answer(
    target: Target,
    engines: Sequence[Engine],
    talks: Sequence[Talk],
    group: Sequence[int],
    sampling: Sampling,
    measured: Measured,
) -> None:
    """All turns of a group of prompts, decoded together by every decoder."""
    for turn in range(max(len(talks[n].turns) for n in group)):
        batch = [n for n in group if turn < len(talks[n].turns)]
        asked = [talks[n].ask(turn) for n in batch]
        for done in (*measured.answers, measured.reference):
            done.prompts += batch
            done.turns += [turn] * len(batch)
        for i in _rotated(len(engines) + 1, group[0] // len(group)):
            if i == len(engines):
                _generate(target, asked, sampling, measured.reference, group[0])
            else:
                _decode(engines[i], asked, sampling, measured.answers[i], group[0])
        for n, result in zip(batch, measured.answers[0].results[-len(batch) :]):
            talks[n].answered(result.tokens)


def _parts(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (numbers[i : i + size] for i in range(0, len(numbers), size))


def versions() -> dict[str, str]:
    """Versions of the packages that decode."""
    return {"vsd": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


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


def _warm_up(
    engines: list[Engine], target: Target, prompts: Sequence[Prompt], sampling: Sampling, concurrency: Sequence[int]
) -> None:
    """Run every engine once without timing, to compile kernels and fill allocators."""
    asked = prompt_inputs(target.tokenizer, [{"role": "user", "content": prompts[0].turns[0]}], target.images)
    short = Sampling(min(8, sampling.max_new_tokens), sampling.temperature)
    for size in concurrency:
        batch = [asked] * min(size, len(prompts))
        for engine in engines:
            _decode(engine, batch, short, Answers(), 0)
        _generate(target, batch, short, Answers(), 0)


def _decode(engine: Engine, asked: Sequence[Inputs], sampling: Sampling, answers: Answers, group: int) -> None:
    results = [Result(inputs) for inputs in asked]
    start = time.perf_counter()
    for number, step in enumerate(engine.stream(results, sampling)):
        if number == 0:
            answers.prefill += step.verify
        else:
            answers.passes += 1
            answers.draft += step.draft
            answers.verify += step.verify
            answers.commit += step.commit
    seconds = time.perf_counter() - start
    answers.batches.append((group, sum(len(result.tokens) for result in results), seconds))
    answers.results += results


def _generate(target: Target, asked: Sequence[Inputs], sampling: Sampling, answers: Answers, group: int) -> None:
    """Answer the same requests with transformers' `generate`."""
    pad = next(iter(target.eos_ids), 0)
    config = transformers.GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampling.temperature > 0,
        temperature=sampling.temperature or None,
        top_k=0 if sampling.temperature > 0 else None,
        eos_token_id=list(target.eos_ids) or None,
        pad_token_id=pad,
    )
    ids, extras = _padded(target, asked, pad)
    torch.manual_seed(sampling.seed)
    start = time.perf_counter()
    with neutral(target.model):
        output = target.model.generate(ids, generation_config=config, **extras)
    new = [_ended(row, target.eos_ids) for row in output[:, ids.shape[1] :].tolist()]
    seconds = time.perf_counter() - start
    answers.batches.append((group, sum(map(len, new)), seconds))
    answers.results += [Result(inputs, tokens) for inputs, tokens in zip(asked, new)]


def _padded(target: Target, asked: Sequence[Inputs], pad: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Token ids and further arguments of `generate`; several prompts, of text alone, are padded on the left."""
    if len(asked) == 1:
        inputs = Padded.of(asked, target.device)
        return inputs.ids, {"attention_mask": torch.ones_like(inputs.ids), **target.decoder.extras(inputs)}
    longest = max(len(inputs.ids) for inputs in asked)
    rows = [[pad] * (longest - len(inputs.ids)) + inputs.ids for inputs in asked]
    mask = [[0] * (longest - len(inputs.ids)) + [1] * len(inputs.ids) for inputs in asked]
    return torch.tensor(rows, device=target.device), {"attention_mask": torch.tensor(mask, device=target.device)}


def _ended(tokens: list[int], ends: Container[int]) -> list[int]:
    """The tokens up to the first end, which is included; behind it a batch is padded."""
    end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: end + 1]


def _run(
    target: Target,
    prompts: Sequence[Prompt],
    contender: Contender,
    number: int,
    measured: dict[int, Measured],
    temperature: float,
) -> Run:
    """The numbers of contender `number`."""
    (answers, reference), shape = next(iter(measured.values())), contender.shape or TreeShape()
    mine, plain, passes = answers[number], answers[0], Passes.of(answers[number])
    same = [a.tokens == b.tokens for a, b in zip(mine.results, plain.results)]
    depth = shape.depth if contender.drafter else 0
    return Run(
        drafter=contender.name,
        temperature=temperature,
        tree=asdict(shape) if contender.drafter else None,
        verification=contender.verification,
        tau=acceptance_length(mine.results),
        tau_ci=rate_interval(*mine.per_pass()),
        tokens_per_second=pooled_rate(*mine.rate()),
        speedup=pooled_rate(*mine.rate()) / pooled_rate(*plain.rate()),
        speedup_ci=ratio_interval(*mine.rate(), *plain.rate()),
        speedup_generate=pooled_rate(*mine.rate()) / pooled_rate(*reference.rate()),
        speedup_generate_ci=ratio_interval(*mine.rate(), *reference.rate()),
        acceptance_per_position=acceptance_per_position(mine.results, depth),
        acceptance_per_position_ci=by_position(passes, depth),
        slices=by_slice(passes, mine, prompts),
        by_context=by_context(passes),
        by_answer=by_answer(passes),
        by_concurrency=[_at(size, at.answers[number], at.answers[0]) for size, at in measured.items()],
        trained_length=contender.trained,
        samples=samples(mine, prompts, lambda tokens: str(target.tokenizer.decode(tokens, skip_special_tokens=True))),
        latency={**_per_pass(mine), "prefill": 1e3 * mine.prefill / len(mine.results)},
        identical=sum(same) / len(same) if temperature == 0 else None,
        new_tokens=sum(len(result.tokens) for result in mine.results),
    )


def _per_pass(answers: Answers) -> dict[str, float]:
    """Milliseconds per target pass, by kind of work."""
    split = {"draft": answers.draft, "verify": answers.verify, "commit": answers.commit}
    return {name: 1e3 * seconds / max(1, answers.passes) for name, seconds in split.items()}


def _at(concurrency: int, mine: Answers, plain: Answers) -> dict[str, Any]:
    """τ and speed with this number of prompts decoded together."""
    return {
        "concurrency": concurrency,
        "tau": acceptance_length(mine.results),
        "tokens_per_second": pooled_rate(*mine.rate()),
        "speedup": pooled_rate(*mine.rate()) / pooled_rate(*plain.rate()),
        "speedup_ci": ratio_interval(*mine.rate(), *plain.rate()),
        "ms_per_pass": sum(_per_pass(mine).values()),
    }
