"""The family `dflash2`: its checkpoints as vLLM and speculators read them, and back.

| format | class | read by |
|---|---|---|
| `vllm` | `DFlash2DraftModel`, model type `qwen3` | vLLM's native path, method `dflash` |
| `speculators` | `DFlash2DraftModel` | vLLM by way of the speculators library |

The tensors are ours. Sizes of convolutions and selector stand in `dflash_config`, in speculators' format at the top.
Read from vLLM 0.32's source (`qwen3_dflash2.py`, `configs/speculators/algos.py`): its CPU build has no speculator for
them, so they are not proved there.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from vsd.drafters.checkpoints import is_of, load
from vsd.drafters.dflash.checkpoint import dflash_config, exported, import_checkpoint, speculators
from vsd.drafters.dflash.model import DFlashConfig, DFlashDrafter
from vsd.drafters.dflash2.model import DFlash2Config, DFlash2Drafter
from vsd.drafters.family import Checkpoint, Family, serve_arguments
from vsd.drafters.feature_drafter import FeatureDrafterConfig, check_decided
from vsd.errors import ConfigurationError, MismatchError
from vsd.targets import TargetInfo

_CLASS = "DFlash2DraftModel"
_SIZES = tuple(DFlash2Config.__annotations__)


def export(drafter: Any, target: TargetInfo, kind: str) -> Checkpoint:
    """A drafter in one of the formats above.

    Raises:
        MismatchError: a drafter that vLLM would load wrong.
    """
    tensors, layer, common = exported(drafter, _CLASS)
    sizes = {name: getattr(drafter.config, name) for name in _SIZES}
    if kind == "speculators":
        return Checkpoint(tensors, {**common, **speculators(drafter, target, "dflash2", layer), **sizes})
    own = {**dflash_config(drafter, common["block_size"]), **sizes}
    return Checkpoint(tensors, {**layer, **common, "dflash_config": own})


def start(trained: Any, target: TargetInfo, **options: Any) -> DFlash2Drafter:
    """A drafter with the states of a DFlash drafter; a pruned LM head is left behind for the target's.

    Args:
        options: fields of `DFlash2Config` that DFlash does not decide.

    Raises:
        ConfigurationError: another family's drafter, or other fields.
    """
    if type(trained) is not DFlashDrafter:
        found = type(trained).__name__
        raise ConfigurationError(
            f"a DFlash2 drafter starts from a DFlash drafter, not from a {found}: leave out family"
        )
    names = (*FeatureDrafterConfig.__annotations__, *DFlashConfig.__annotations__)
    check_decided(options, names)
    fields = {name: getattr(trained.config, name) for name in names if name != "draft_vocab_size"}
    drafter = DFlash2Drafter.for_target(target, trained.vocabulary, **{**fields, **options})
    left = ("lm_head.weight", "d2t", "t2d")
    weights = {name: tensor for name, tensor in trained.state_dict().items() if name not in left}
    drafter.load_state_dict(weights, strict=False)
    return drafter


def reads(config: Mapping[str, Any]) -> bool:
    """Whether config.json is that of a DFlash2 drafter: ours, native, or speculators'."""
    return is_of(config, DFlash2Drafter, "dflash2", _CLASS in (config.get("architectures") or []))


def read(folder: Path, target: TargetInfo) -> Any:
    """A released drafter, in either format, as ours.

    Raises:
        MismatchError: a pruned vocabulary, other sizes than the tensors', or see `import_checkpoint`.
    """
    try:
        return import_checkpoint(DFlash2Drafter, {}, folder, target)
    except ValueError as error:
        raise MismatchError(f"'{folder}' is no DFlash2 drafter that vsd reads: {error}") from error


def _serve(kind: str, out: str, tokens: int) -> str:
    return serve_arguments(kind, "DFLASH", "dflash", out, tokens)


FAMILY = Family(
    title=DFlash2Drafter.title,
    new=DFlash2Drafter.for_target,
    reads=reads,
    load=partial(load, DFlash2Drafter, read),
    export=export,
    formats=("vllm", "speculators"),
    serve=_serve,
    kind=DFlash2Drafter,
    drafts_all=True,
    start=start,
    starts_trained=True,
)
