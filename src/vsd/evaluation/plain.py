"""`generate` of transformers as the reference: what a call leaves open is the library's default."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers


@contextmanager
def neutral(model: Any) -> Iterator[None]:
    """Within it `model.generate` does what its arguments say, and nothing that the model's own configuration adds.

    transformers fills settings that a call leaves open from the checkpoint's generation_config.json: a repetition
    penalty, top_p, suppressed tokens, and also the end tokens, which the call therefore names.
    """
    own, model.generation_config = model.generation_config, transformers.GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
