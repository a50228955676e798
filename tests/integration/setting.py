"""Paths, the sizes of these tests, and the settings that vLLM is given."""

import json
import shlex
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from vsd.drafters.load import family_of
from vsd.drafters.where import EMBEDDED
from vsd.targets import Inputs, Target

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
DRAFTER = EMBEDDED
TEXT = Path(str(files("vsd") / "assets" / "smollm2-135m-text.jsonl.gz"))
PROMPTS, LENGTH = 24, 64
CHATS, SHOWN = 20, (1, 1, 1, 2, 0)  # chats about pictures, and how many each shows, in turn
QUESTIONS = (
    "Tell me in a few sentences what you see.",
    "Invent a fable that begins like this.",
    "Write instructions for somebody who paints it.",
    "Write an advertisement for it.",
)
SKIPPED = slice(14, 16)  # layers of the target that the draft model lacks
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


class Asked(NamedTuple):
    """A target and its prompts.

    Attributes:
        folder: of the target.
        targets: the target by precision.
        prompts: as vLLM is given them: token ids, or messages.
        inputs: the same for our own decoder.
    """

    folder: str
    targets: dict[str, Target]
    prompts: list[Any]
    inputs: list[Inputs]


def speculative(exported: Path, k: int) -> dict[str, Any]:
    """vLLM's `speculative_config` for an exported drafter, as `vsd export` prints it."""
    _, options = shlex.split(family_of(exported).serve("vllm", str(exported), k))
    found: dict[str, Any] = json.loads(options)
    return found
