"""`vsd demo`."""

from dataclasses import dataclass
from pathlib import Path

from vsd.cli.parser import Command, Given

EXAMPLES = """\
  vsd demo --minutes 10 --out runs/demo

Trains drafters of SmolLM2-135M on text that it wrote, then answers held-out questions with and without them."""


@dataclass
class Demo:
    """demo

    Attributes:
        minutes: training time, of all drafters together
        out: folder for the drafter and results.json
        seed: seed of training and sampling
    """

    minutes: float = 10.0
    out: Path = Path("runs/demo")
    seed: int = 0


def run(given: Given) -> None:
    """Train, then measure."""
    from vsd.demo import demo

    a = given.of(Demo)
    demo(a.minutes, a.out, a.seed)


COMMAND = Command("Train drafters of a small model within minutes, and measure them.", EXAMPLES, (Demo,), run)
