"""A drafter that reads features of its target's layers and embeds tokens as its target does.

Common to EAGLE-3 and the block drafters: sizes, draft vocabulary, the check of the target, checkpoints of our own.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from vsd.drafters.base import FeatureSpec
from vsd.drafters.entry_cache import EntryCache
from vsd.drafters.proposals import Proposals
from vsd.drafters.vocabulary import DraftVocabulary, draft_ids
from vsd.errors import ConfigurationError, MismatchError
from vsd.targets import TargetInfo
from vsd.targets.packed import pack_linears

_SIZES = ("vocab_size", "draft_vocab_size", "hidden_size", "intermediate_size", "head_dim", "max_position_embeddings")


class FeatureDrafterConfig(PreTrainedConfig):
    """Sizes of a drafter, and which target it belongs to.

    `aux_layers` are decoder-layer *input* indices of the target (vLLM's convention). `image_inputs` says what a drafter
    of a target that reads images embeds at their positions: "placeholder", the placeholder token itself, as in vLLM
    (the picture reaches the drafter by the target's features), or "embeddings", the target's own inputs there, as in
    SGLang.
    """

    vocab_size: int = 32000
    draft_vocab_size: int = 8192
    hidden_size: int = 576
    intermediate_size: int = 1536
    num_attention_heads: int = 9
    num_key_value_heads: int = 3
    head_dim: int = 64
    hidden_act: str = "silu"
    mlp_bias: bool = False
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 8192
    rope_parameters: dict[str, Any] | None = None
    initializer_range: float = 0.02
    aux_layers: tuple[int, ...] | list[int] = (2, 15, 27)
    target_hidden_size: int | None = None
    target_fingerprint: str | None = None
    image_inputs: str | None = None
    tie_word_embeddings: bool = False

    @property
    def feature_width(self) -> int:
        """n h: width of the features of all layers."""
        return len(self.aux_layers) * (self.target_hidden_size or self.hidden_size)


class FeatureDrafter(Proposals, PreTrainedModel):
    """The drafter; a family adds weights and passes.

    Attributes:
        title: of the family, for messages.
        untrained: whether it was made by `for_target` and not trained since; False if it was made of trained blocks.
        reads_final: whether the final hidden states, index L of `aux_layers`, are among its features.
        image_rules: the values of `image_inputs` that its family knows.
    """

    title: ClassVar[str]
    untrained: bool = False
    reads_final: ClassVar[bool] = False
    image_rules: ClassVar[tuple[str, ...]] = ("placeholder",)
    config_class: Any
    base_model_prefix = ""
    config: Any
    d2t: Tensor
    t2d: Tensor

    def __init__(self, config: FeatureDrafterConfig) -> None:
        check_sizes(config)
        super().__init__(config)
        self.register_buffer("d2t", torch.full((config.draft_vocab_size,), -1))
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))
        self.embed: Callable[[Tensor], Tensor] = _detached

    @classmethod
    def for_target(cls, target: TargetInfo, vocabulary: DraftVocabulary, **overrides: Any) -> Self:
        """A new drafter, randomly initialised, with the target's width and rotary embedding.

        Args:
            overrides: any field of the family's configuration.
        """
        cls._check_fields(overrides)
        fields = {**cls.fields_for(target, overrides), "draft_vocab_size": vocabulary.size, **overrides}
        drafter: Any = cls(cls.config_class(**fields))
        drafter.untrained = True
        drafter.d2t.copy_(vocabulary.d2t)
        drafter.t2d.copy_(vocabulary.t2d)
        drafter.to(target.device)
        drafter.attach(target)
        own: Self = drafter
        return own

    @classmethod
    def _check_fields(cls, overrides: dict[str, Any]) -> None:
        """Refuse what is no field of the family's configuration; further fields of transformers would be ignored."""
        kinds = [kind for kind in cls.config_class.__mro__ if issubclass(kind, FeatureDrafterConfig)]
        known, one_layer = {name for kind in kinds for name in kind.__annotations__}, ("num_hidden_layers", 1)
        unknown = [name for name, value in overrides.items() if name not in known and (name, value) != one_layer]
        if overrides.get("tie_word_embeddings"):  # an engine would take the target's embedding for the draft head
            unknown.append("tie_word_embeddings")
        if unknown:
            raise ConfigurationError(f"drafter_options: {cls.title} has no field {', '.join(unknown)}: leave it out")

    @classmethod
    def fields_for(cls, target: TargetInfo, overrides: dict[str, Any]) -> dict[str, Any]:
        """Fields of the configuration that the target decides."""
        layers = overrides.get("aux_layers") or default_layers(target.config.num_hidden_layers)
        config = target.config
        heads = config.num_attention_heads
        return {
            "vocab_size": target.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_attention_heads": heads,
            "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
            "max_position_embeddings": config.max_position_embeddings,
            "rope_parameters": _full_rotary(config),
            "aux_layers": list(layers),
            "target_fingerprint": target.fingerprint(layers),
            "image_inputs": None if target.images is None else "placeholder",
        }

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """Load a saved drafter; every tensor must be there, and none may be left over.

        Raises:
            MismatchError: there is no drafter at `path`, or its tensors are not exactly those of the architecture.
        """
        options: dict[str, Any] = {"use_safetensors": True, "dtype": torch.float32, **kwargs}
        options["ignore_mismatched_sizes"] = True  # named below, with what else is wrong
        load: Callable[..., Any] = super().from_pretrained
        try:
            drafter, found = load(path, *args, output_loading_info=True, **options)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise MismatchError(f"cannot load a drafter from '{path}': {str(error).splitlines()[0]}") from error
        wrong = {kind: sorted(keys) for kind, keys in found.items() if keys}
        if wrong:
            raise MismatchError(f"'{path}' is not the {cls.title} that its config describes: {wrong}")
        draft_ids(path, drafter.d2t, drafter.t2d)
        own: Self = drafter
        return own

    @property
    def needs(self) -> FeatureSpec:
        """Some decoder layers of the target."""
        return FeatureSpec(tuple(self.config.aux_layers))

    @property
    def vocabulary(self) -> DraftVocabulary:
        """From `d2t`."""
        return DraftVocabulary(torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t, len(self.t2d))

    @abstractmethod
    def decoder_layers(self) -> Sequence[Any]:
        """Its layers."""

    def new_cache(self, rows: int, capacity: int) -> EntryCache:
        """Without entries."""
        config = self.config
        heads, layers = config.num_key_value_heads, len(self.decoder_layers())
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return EntryCache(layers, rows, heads, capacity, config.head_dim, like)

    def freeze(self) -> None:
        """See `Drafter.freeze`; queries are asked of fewer entries than keys and values."""
        pack_linears(self.eval().requires_grad_(False), together=(("k_proj", "v_proj"), ("gate_proj", "up_proj")))

    def attach(self, target: TargetInfo) -> None:
        """See `Drafter.attach`; the drafter embeds tokens as the target does. One without a target takes this one."""
        config = self.config
        fingerprint = target.fingerprint(config.aux_layers)
        pairs = {
            "vocabulary": (config.vocab_size, target.vocab_size),
            "hidden size": (config.target_hidden_size or config.hidden_size, target.hidden_size),
            "fingerprint": (config.target_fingerprint or fingerprint, fingerprint),
        }
        for name, (mine, theirs) in pairs.items():
            if mine != theirs:
                raise MismatchError(f"this drafter was trained for another target: {name} {mine}, not {theirs}")
        count = target.config.num_hidden_layers
        if not all(0 <= layer < count + self.reads_final for layer in config.aux_layers):
            raise MismatchError(f"aux_layers are {list(config.aux_layers)}, and the target has {count} layers")
        if hasattr(config, "mask_token_id"):
            _check_mask(config.mask_token_id, len(target.embedding_weight))
        if config.target_fingerprint is None:
            config.target_fingerprint = fingerprint
            config.image_inputs = self.fields_for(target, {})["image_inputs"]
        self._check_images(target)
        self.embed = lambda ids: target.embed(ids)  # not a method: a copy of the drafter would copy the target

    def _check_images(self, target: TargetInfo) -> None:
        rule = self.config.image_inputs
        if rule is not None and rule not in self.image_rules:
            raise MismatchError(f"image_inputs of a {self.title} is {' or '.join(self.image_rules)}, not {rule!r}")
        if rule == "embeddings" and target.images is None:
            raise MismatchError("image_inputs is for targets that read images, and the target reads none: leave it out")


def _check_mask(mask: object, tokens: int) -> None:
    if type(mask) is not int or not 0 <= mask < tokens:
        raise MismatchError(f"mask_token_id must be one of the target's {tokens} tokens, not {mask!r}")


def check_sizes(config: Any) -> None:
    """Refuse sizes that no drafter has, before torch fails on them or computes something else.

    Raises:
        MismatchError: the message holds the size's name.
    """
    for name in (*_SIZES, "num_attention_heads", "num_key_value_heads", "num_hidden_layers"):
        value = getattr(config, name, 1)  # families of one layer have no number of layers
        if type(value) is not int or value < 1:
            raise MismatchError(f"{name} of a drafter must be a positive integer, not {value!r}")
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    layers, epsilon = config.aux_layers, config.rms_norm_eps
    for right, what in (
        (heads % groups == 0, f"num_attention_heads must be a multiple of num_key_value_heads: {heads}, {groups}"),
        (config.head_dim % 2 == 0, f"head_dim must be even, not {config.head_dim}"),
        (isinstance(epsilon, int | float) and epsilon >= 0, f"rms_norm_eps must be a number, not {epsilon!r}"),
        (bool(layers) and all(type(i) is int for i in layers), f"aux_layers must be layer numbers, not {layers!r}"),
    ):
        if not right:
            raise MismatchError(what)


def check_decided(options: Iterable[str], decided: Iterable[str]) -> None:
    """Refuse fields of a new drafter that the trained drafter from which it starts decides.

    Raises:
        ConfigurationError: the message holds their names.
    """
    if fixed := sorted({*options} & {*decided}):
        raise ConfigurationError(f"drafter_options: the given drafter decides {', '.join(fixed)}: leave them out")


def default_layers(num_layers: int) -> tuple[int, ...]:
    """EAGLE-3's three feature layers, by input index: [2, L/2, L-3]; spread evenly where there are fewer than six."""
    if num_layers < 6:
        return (0, num_layers // 2, num_layers - 1)
    return (2, num_layers // 2, num_layers - 3)


def _detached(ids: Tensor) -> Tensor:
    raise MismatchError("this drafter has no target yet: call `attach` first")


def _full_rotary(config: Any) -> dict[str, Any]:
    """The target's rotary parameters, as one full-width rotation of one row of positions.

    Mixed, partial and multimodal ones (M-RoPE) have no twin in a drafter.
    """
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    if "full_attention" in parameters:
        parameters = dict(parameters["full_attention"])
    for name in ("partial_rotary_factor", "mrope_section", "mrope_interleaved"):
        parameters.pop(name, None)
    return {"rope_type": "default", "rope_theta": 10000.0} | parameters
