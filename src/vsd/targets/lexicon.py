"""The target without its weights: how it spells, where it stops, how much it reads.

Enough to ask a server that holds the weights, and to write down what it answers.
"""

from typing import NamedTuple

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from vsd.errors import VSDError
from vsd.targets.load import first_line, resolve
from vsd.targets.target import Target, end_ids


class Lexicon(NamedTuple):
    """`eos_ids` end an answer; `context` is the longest sequence the target reads, None if unknown."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    context: int | None
    eos_ids: tuple[int, ...]

    @classmethod
    def of(cls, target: Target) -> "Lexicon":
        """That of a loaded target."""
        context = getattr(target.config, "max_position_embeddings", None)
        return cls(target.name, target.tokenizer, target.vocab_size, context, target.eos_ids)


def load_lexicon(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Lexicon:
    """Read tokenizer and configuration of a target: hub id, folder, `.gguf` file or "smollm2-135m".

    Raises:
        VSDError: nothing loadable under that name.
    """
    path = resolve(name)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        config = AutoConfig.from_pretrained(path, **options).get_text_config()
    except (OSError, ValueError) as error:
        raise VSDError(f"cannot read the tokenizer of '{name}': {first_line(error)}") from error
    try:
        generation = GenerationConfig.from_pretrained(path, revision=revision or "main")
    except OSError:  # many models have no generation_config.json
        generation = None
    context = getattr(config, "max_position_embeddings", None)
    return Lexicon(name, tokenizer, config.vocab_size, context, end_ids(generation, tokenizer))
