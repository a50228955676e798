"""The family `peagle`: checkpoints in the layout of EAGLE-3's, and the start from a trained EAGLE-3 drafter.

vLLM serves them as `eagle3` with `parallel_drafting`; SGLang 0.5 does not.
"""

from typing import Any

import torch

from vsd.drafters.eagle3.checkpoint import Layout, family, named_mask_token
from vsd.drafters.eagle3.model import Eagle3Drafter
from vsd.drafters.family import serve_arguments
from vsd.drafters.feature_drafter import FeatureDrafterConfig, check_decided
from vsd.drafters.peagle.model import PeagleConfig, PeagleDrafter
from vsd.errors import ConfigurationError
from vsd.targets import TargetInfo


def start(trained: Any, target: TargetInfo, **options: Any) -> PeagleDrafter:
    """A drafter that proposes what an EAGLE-3 drafter proposes first; its further layers add nothing yet.

    Args:
        options: fields of `PeagleConfig` that EAGLE-3 does not decide.

    Raises:
        ConfigurationError: another family's drafter, or other fields.
    """
    if not isinstance(trained, Eagle3Drafter):
        found = type(trained).__name__
        raise ConfigurationError(
            f"a P-EAGLE drafter starts from an EAGLE-3 drafter, not from a {found}: leave out family"
        )
    check_decided(options, FeatureDrafterConfig.__annotations__)
    sizes = {name: getattr(trained.config, name) for name in FeatureDrafterConfig.__annotations__}
    drafter = PeagleDrafter.for_target(target, trained.vocabulary, **{**sizes, **options})
    weights = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in trained.state_dict().items()}
    drafter.load_state_dict(weights, strict=False)
    with torch.no_grad():
        for layer in drafter.decoder_layers()[1:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return drafter


def _read(raw: dict[str, Any], layers: int) -> dict[str, Any]:
    return {"num_hidden_layers": layers, "mask_token_id": named_mask_token(raw)}


def _write(config: PeagleConfig) -> dict[str, Any]:
    return {
        "num_hidden_layers": config.num_hidden_layers,
        "mask_token_id": config.mask_token_id,
        "pard_token": config.mask_token_id,
    }


def _serve(kind: str, out: str, tokens: int) -> str:
    return serve_arguments(kind, "", "eagle3", out, tokens, parallel_drafting=True)


LAYOUT = Layout(PeagleDrafter, "PEagleDraftModel", "peagle", "layers.0.", True, _read, _write)
FAMILY = family(LAYOUT, ("vllm", "speculators"), _serve, start=start)
