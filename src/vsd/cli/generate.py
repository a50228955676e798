"""`vsd generate`."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from vsd.cli.parser import Command, Given
from vsd.cli.shared import DecodingOptions, load
from vsd.errors import ConfigurationError
from vsd.options import TargetOptions

EXAMPLES = """\
  vsd generate --drafter runs/mine/drafter "Write a haiku about the sea."
  echo "Why is the sky blue?" | vsd generate --temperature 0.8 --top-p 0.95
  vsd generate --target T --image photo.jpg "What is on the table?"
  vsd generate --tree 5x4x12x0x8 "Repeat after me: …"            prompt lookup alone: no drafter

Accepted draft tokens are green; tokens of the target itself have the terminal's colour."""


@dataclass
class Generate:
    """prompt and drafter

    Attributes:
        prompt: user message (default: standard input)
        drafter: folder or hub id of a drafter; without it the target decodes alone
        system: system message
        image: image file that the message is about; may be repeated
    """

    prompt: str | None = field(default=None, metadata={"positional": True})
    drafter: str | None = field(default=None, metadata={"metavar": "FOLDER"})
    system: str | None = None
    image: list[str] = field(default_factory=list, metadata={"metavar": "FILE", "single": True})


@dataclass
class SamplingOptions:
    """sampling

    Attributes:
        max_new_tokens: longest answer in tokens
        temperature: sampling temperature; 0 is greedy
        top_p: sample from the most probable tokens with this total probability
        sample_top_k: sample from this many most probable tokens; 0: from all
        min_p: sample from tokens with at least this share of the highest probability
        repetition_penalty: above 1: make tokens of the text less probable
        stop: string that ends the answer; may be repeated
        seed: seed of sampling
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    sample_top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: list[str] = field(default_factory=list, metadata={"single": True})
    seed: int = 0


def run(given: Given) -> None:
    """Answer one message."""
    from vsd.decoding import Sampling
    from vsd.decoding.stream import answer
    from vsd.drafters import load_drafter
    from vsd.paths import TreeShape
    from vsd.targets.images import Picture

    a, s, d = given.of(Generate), given.of(SamplingOptions), given.of(DecodingOptions)
    sampling = Sampling(
        max_new_tokens=s.max_new_tokens,
        temperature=s.temperature,
        stop=tuple(s.stop),
        seed=s.seed,
        top_p=s.top_p,
        top_k=s.sample_top_k,
        min_p=s.min_p,
        repetition_penalty=s.repetition_penalty,
    )
    shape = TreeShape.parse(d.tree)
    prompt = a.prompt if a.prompt is not None else sys.stdin.read()
    if not prompt.strip():
        raise ConfigurationError('the prompt is empty: vsd generate "your question"')
    pictures = [Picture.of(Path(path)) for path in a.image]
    target = load(given.of(TargetOptions), d.compile)
    drafter = load_drafter(a.drafter, target) if a.drafter else None
    answer(target, drafter, shape, prompt, sampling, system=a.system, pictures=pictures, verification=d.verification)


COMMAND = Command(
    "Answer a message by speculative decoding.",
    EXAMPLES,
    (Generate, SamplingOptions, DecodingOptions, TargetOptions),
    run,
)
