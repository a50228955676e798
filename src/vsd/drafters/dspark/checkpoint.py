"""The family `dspark`: its checkpoints as vLLM and speculators read them, and back.

| format | class | read by |
|---|---|---|
| `vllm` | `Qwen3DSparkModel`, model type `qwen3` | vLLM's native path, method `dspark` |
| `speculators` | `Qwen3DSparkModel` | vLLM by way of the speculators library |

The tensors are ours. Both are read from vLLM's source; its CPU build has no speculator for them, so they are not proved
there.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from vsd.drafters.checkpoints import is_of, load
from vsd.drafters.dflash.checkpoint import exported, import_checkpoint, speculators
from vsd.drafters.dspark.model import DSparkDrafter
from vsd.drafters.family import Checkpoint, Family, serve_arguments
from vsd.targets import TargetInfo

_CLASS = "Qwen3DSparkModel"
_CONFIDENCE = {"enable_confidence_head": False, "confidence_head_with_markov": False}  # where config.json is silent


def export(drafter: Any, target: TargetInfo, kind: str) -> Checkpoint:
    """A drafter in one of the formats above.

    Raises:
        MismatchError: a drafter that vLLM would load wrong.
    """
    config = drafter.config
    tensors, layer, common = exported(drafter, _CLASS, anchored=True)
    heads = {"markov_head_type": "vanilla", **{name: getattr(config, name) for name in ("markov_rank", *_CONFIDENCE)}}
    if kind == "speculators":
        return Checkpoint(tensors, {**common, **speculators(drafter, target, "dspark", layer), **heads})
    own = {
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": [index - 1 for index in config.aux_layers],
        "sample_from_anchor": config.sample_from_anchor,
        "dspark_bonus_anchor": not config.sample_from_anchor,
        "dflash_config": {"causal": config.causal},
    }
    return Checkpoint(tensors, {**layer, **common, **own, **heads})


def reads(config: Mapping[str, Any]) -> bool:
    """Whether config.json is that of a DSpark drafter: ours, native, or speculators'."""
    return is_of(config, DSparkDrafter, "dspark", _CLASS in (config.get("architectures") or []))


def _serve(kind: str, out: str, tokens: int) -> str:
    return serve_arguments(kind, "DSPARK", "dspark", out, tokens)


FAMILY = Family(
    title=DSparkDrafter.title,
    new=DSparkDrafter.for_target,
    reads=reads,
    load=partial(load, DSparkDrafter, partial(import_checkpoint, DSparkDrafter, _CONFIDENCE)),
    export=export,
    formats=("vllm", "speculators"),
    serve=_serve,
    kind=DSparkDrafter,
)
