"""Load a drafter to draft with."""

from pathlib import Path

from vsd.drafters.eagle3 import Eagle3Drafter
from vsd.targets import Target
from vsd.targets.packed import pack_linears


def load_drafter(path: str | Path, target: Target) -> Eagle3Drafter:
    """A saved drafter in the target's precision, on its device, frozen, its weights packed where that helps.

    The target is set to yield the features this drafter takes; one that another drafter was loaded for before will
    refuse that one if they differ.

    Raises:
        VSDError: there is no drafter at `path`, or it belongs to another target.
    """
    drafter = Eagle3Drafter.from_pretrained(path, dtype=target.model.dtype, device_map=target.device)
    target.take_features(drafter.config.aux_layers)
    drafter.check_target(target)
    # Queries are asked of fewer entries than keys and values.
    pack_linears(drafter.eval().requires_grad_(False), together=(("k_proj", "v_proj"), ("gate_proj", "up_proj")))
    return drafter
