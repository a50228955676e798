"""Bounds of numeric options, by name: an option has the same name and meaning in flags, recipes and Python."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vsd.errors import ConfigurationError


class Bound(NamedTuple):
    """A condition, and its words, as in "limit must be at least 1"."""

    words: str
    fits: Callable[[float], bool]


_COUNT = Bound("at least 1", lambda x: 1 <= x < math.inf)
_AMOUNT = Bound("0 or a positive number", lambda x: 0 <= x < math.inf)
_POSITIVE = Bound("positive", lambda x: 0 < x < math.inf)
_SHARE = Bound("between 0 and 1", lambda x: 0 <= x <= 1)
_DECAY = Bound("at least 0 and below 1", lambda x: 0 <= x < 1)
_SEED = Bound("between 0 and 4294967295", lambda x: 0 <= x < 2**32)  # what numpy's generator takes

BOUNDS: dict[str, Bound] = {
    **dict.fromkeys(("limit", "batch_size", "max_length", "max_new_tokens", "tokens", "conversations"), _COUNT),
    **dict.fromkeys(("concurrency", "draft_vocab_size", "draft_steps", "eval_max_new_tokens", "eval_batch"), _COUNT),
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps", "save_total_limit"), _COUNT),
    "max_steps": Bound("at least 1, or -1: num_train_epochs decides", lambda x: x == -1 or 1 <= x < math.inf),
    **dict.fromkeys(("held_out", "dataloader_num_workers"), _AMOUNT),
    **dict.fromkeys(("temperature", "prompt_temperature", "learning_rate", "weight_decay", "warmup_steps"), _AMOUNT),
    **dict.fromkeys(("max_grad_norm", "adam_epsilon"), _AMOUNT),
    **dict.fromkeys(("minutes", "max_minutes", "requests_per_second", "num_train_epochs"), _POSITIVE),
    **dict.fromkeys(("eval_steps", "logging_steps", "save_steps"), _POSITIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), _DECAY),
    **dict.fromkeys(("ramp", "locality"), _SHARE),
    "seed": _SEED,
}


def check_bounds(values: Mapping[str, Any]) -> None:
    """Refuse numbers out of bounds, alone or in a list; other values and other names are not looked at.

    Raises:
        ConfigurationError: the message holds the name, the bound and the value.
    """
    for name, value in values.items():
        bound = BOUNDS.get(name)
        for x in value if isinstance(value, list) else [value]:
            if bound is not None and isinstance(x, int | float) and not bound.fits(x):
                raise ConfigurationError(f"{name} must be {bound.words}, not {x}")
