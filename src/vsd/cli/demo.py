"""`vsd demo`."""

from dataclasses import dataclass
from pathlib import Path

from vsd.cli.parser import Command, Given

EXAMPLES = """\
  vsd demo --minutes 10 --out runs/demo

Continues a drafter of SmolLM2-135M on logged requests for e-mails, with EAGLE-3's objective and with VSD's, then
answers other requests with plain decoding, the drafter as it was, and both results.

  vsd demo --from-scratch

Trains drafters from random weights instead, on text of many kinds that the target wrote."""


@dataclass
class Demo:
    """demo

    Attributes:
        minutes: training time, of all drafters together
        from_scratch: train drafters from random weights
        out: folder for the drafter and results.json
        seed: seed of training and sampling
    """

    minutes: float = 10.0
    from_scratch: bool = False
    out: Path = Path("runs/demo")
    seed: int = 0


def run(given: Given) -> None:
    """Train, then measure."""
    from vsd.demo import demo, from_scratch
    from vsd.errors import ConfigurationError
    from vsd.files import alone

    a = given.of(Demo)
    if a.minutes < 1:
        raise ConfigurationError("the demo needs a minute at least: --minutes 1")
    with alone(a.out):
        (from_scratch if a.from_scratch else demo)(a.minutes, a.out, a.seed)


COMMAND = Command("Train drafters of a small model within minutes, and measure them.", EXAMPLES, (Demo,), run)
