"""The family `lm`: made for a target, read from and written as a plain folder of transformers."""

from collections.abc import Mapping
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from vsd.drafters.family import Checkpoint, Family, serve_arguments
from vsd.drafters.lm.model import LMDrafter
from vsd.targets import TargetInfo


def _reads(config: Mapping[str, Any]) -> bool:
    """A causal LM of transformers, by its architecture."""
    return any(name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in config.get("architectures") or [])


def _export(drafter: LMDrafter, target: TargetInfo, kind: str) -> Checkpoint:
    """The plain model; weights that are tied are written once."""
    config = drafter.model.config.to_dict()
    config |= {
        "architectures": [type(drafter.model).__name__],
        "torch_dtype": str(drafter.dtype).removeprefix("torch."),
    }
    tensors = dict(drafter.state_dict())
    if config.get("tie_word_embeddings"):
        tied = {name for name, tensor in tensors.items() if tensor is drafter.lm_head.weight or "lm_head" in name}
        tensors = {name: tensor for name, tensor in tensors.items() if name not in tied}
    return Checkpoint(tensors, config)


def _serve(kind: str, out: str, tokens: int) -> str:
    return serve_arguments(kind, "STANDALONE", "draft_model", out, tokens)


FAMILY = Family(
    title="Draft model",
    new=LMDrafter.for_target,
    reads=_reads,
    load=LMDrafter.read,
    export=_export,
    formats=("sglang", "vllm"),
    serve=_serve,
    kind=LMDrafter,
    drafts_all=True,
    needs_tokenizer=True,
)
