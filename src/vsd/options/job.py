"""The training job: the target, the text and the drafter. How the drafter is trained: `vsd.options.training`."""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vsd.errors import ConfigurationError
from vsd.options.bounds import check_bounds
from vsd.options.online import OnlineOptions
from vsd.options.values import checked

EMBEDDED = "smollm2-135m"  # a target that a PyPI wheel brings: see `vsd.targets.load`


@dataclass
class TargetOptions:
    """target

    Attributes:
        target: hub id, folder or .gguf file of the target
        dtype: precision of the target: auto (the fastest on this device), float32, bfloat16 or float16
        device: auto (the first GPU, if there is one), cpu, cuda, cuda:1, …; or split: the layers over all GPUs, for a
            target that is too large for one
        revision: branch, tag or commit of the target on the hub
        trust_remote_code: run Python code that the target's repository brings
    """

    target: str = EMBEDDED
    dtype: str = "auto"
    device: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def loading(self) -> dict[str, Any]:
        """Arguments of `load_target` and `load_target_info` besides the name."""
        names = ("dtype", "device", "revision", "trust_remote_code")
        return {name: getattr(self, name) for name in names}


@dataclass
class TextOptions:
    """data

    Attributes:
        data: training text that the target wrote: files (JSONL, Parquet, …), folders of files or hub datasets
        max_length: longest conversation in tokens; a longer one is an unusable line
        held_out: conversations that are not trained on, with all their turns and all answers to the same first prompt:
            τ is measured on their prompts during training
        on_bad_line: unusable line: stop (fatal), or report the line and continue (skip)
        download_images: fetch images from http URLs in the text; else such a line is unusable
        features: store (compute the target's features once and keep them in the output folder), online (compute them in
            every step), auto (store those of a target of up to a billion parameters, if the disk has room), the path of
            a folder that several runs on the same text share, or the URL of a vLLM server started as vsd data server
            says: with --held-out 0 and an objective that samples nothing from the drafter only the tokenizer,
            embeddings, final norm and LM head of the target are loaded here; the server also samples the continuations
            of the E-step
    """

    data: list[str] = field(default_factory=list)
    max_length: int = 2048
    held_out: int = 32
    on_bad_line: Literal["fatal", "skip"] = "fatal"
    download_images: bool = False
    features: str = "auto"


@dataclass
class DrafterOptions:
    """drafter

    Attributes:
        drafter: folder or hub id of a drafter to continue from; without it a new drafter starts from random weights
        family: family of a new drafter: eagle3 (default), peagle, dflash, dflash2, dspark, vispec (for targets that
            read images) or lm. With a --drafter of another family the new drafter starts from it: peagle from eagle3,
            dflash2 from dflash
        drafter_options: fields of a new drafter's configuration, such as num_hidden_layers
        draft_vocab_size: number of target tokens that a new drafter can draft; by default 8192, and 32000 for a target
            with hidden states of 2048 numbers or more
        output_dir: folder for checkpoints, training curves and the trained drafter
    """

    drafter: str | None = None
    family: str | None = None
    drafter_options: dict[str, Any] = field(default_factory=dict)
    draft_vocab_size: int | None = None
    output_dir: str = "runs/drafter"


def draft_vocabulary_size(given: int | None, hidden_size: int, vocab_size: int) -> int:
    """Tokens that a new drafter can draft: as given, or by the target's sizes."""
    default = 8192 if hidden_size < 2048 else 32000
    return min(default if given is None else given, vocab_size)


@dataclass
class TrainJob(TargetOptions, TextOptions, DrafterOptions, OnlineOptions):
    """A training job; the configuration of the training itself is `vsd.training.VSDConfig`.

    Raises:
        ConfigurationError: a value of a wrong type, or a value that has no meaning.
    """

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            setattr(self, f.name, checked(f.name, f.type, getattr(self, f.name)))
        check_bounds(vars(self))
        if not self.output_dir.strip():
            raise ConfigurationError("output_dir is empty: give the path of a folder")
        if self.features not in ("auto", "store", "online") and os.sep not in self.features:
            raise ConfigurationError(
                f"features must be auto, store, online, a server's URL or a folder such as ./{self.features}, not "
                f"'{self.features}'"
            )

    @property
    def server(self) -> str | None:
        """Address of the server that gives the features, if there is one."""
        return self.features if self.features.startswith(("http://", "https://")) else None

    @property
    def store(self) -> Path | None:
        """Folder of the feature store, if there is to be one; None if features are computed in every step."""
        if self.features == "online" or self.server is not None:
            return None
        return Path(self.output_dir) / "features" if self.features in ("auto", "store") else Path(self.features)
