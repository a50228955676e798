"""Options that cannot apply together are refused before the target is loaded: none is ignored."""

import dataclasses
from typing import Any

from vsd.drafters.family import Family
from vsd.drafters.load import DEFAULT, family_named, family_of
from vsd.errors import ConfigurationError
from vsd.options import OnlineOptions, TrainJob
from vsd.training.config import VSDConfig

_ELSEWHERE = {
    **dict.fromkeys(("vocab_size", "target_fingerprint"), "the target's"),
    **dict.fromkeys(("architectures", "model_type"), "the family's"),
    **dict.fromkeys(("dtype", "torch_dtype"), "float32 in training"),
    "draft_vocab_size": "an option of its own, --draft-vocab-size",
}  # fields of a configuration that drafter_options do not set


def check_applicable(job: TrainJob, config: VSDConfig) -> None:
    """Refuse options that the drafter, its family or the kind of training cannot take.

    Raises:
        ConfigurationError: naming the option and the remedy.
        MismatchError: there is no drafter in the given folder.
    """
    if job.drafter is None:
        _check_new(job)
    else:
        _check_given(job, job.drafter)
    _check_locality(job, config)
    if job.online:
        _check_online(job, config)
    else:
        default = OnlineOptions()
        names = [f.name for f in dataclasses.fields(OnlineOptions)]
        if unused := [name for name in names if getattr(job, name) != getattr(default, name)]:
            raise ConfigurationError(f"{', '.join(unused)}: for online training: add --online, or leave it out")
    if config.patience is not None and not job.held_out:
        raise ConfigurationError("patience needs measurements of τ: give --held-out a number above 0, or leave it out")


def _check_locality(job: TrainJob, config: VSDConfig) -> None:
    """Only untrained blocks have a locality."""
    if config.locality == VSDConfig.locality:
        return
    given = None if job.drafter is None else family_of(job.drafter)
    wanted = _wanted(job, given)
    kind: Any = wanted.kind
    if wanted is given or (given is not None and wanted.starts_trained) or not kind.one_pass:
        raise ConfigurationError("locality is for a new block drafter: leave it out")


def _wanted(job: TrainJob, given: Family | None) -> Family:
    """The family to train: the job's, else that of the given drafter, else the default."""
    return given if given is not None and job.family is None else family_named(job.family or DEFAULT)


def _check_online(job: TrainJob, config: VSDConfig) -> None:
    """Online training answers with a drafter, in the processes that train, and takes features from decoding."""
    if job.drafter is None:
        raise ConfigurationError("--online answers with a drafter: give the one to continue from, --drafter FOLDER")
    if job.features not in ("auto", "online"):
        raise ConfigurationError("--online takes the features from decoding: leave out --features")
    loading: Any = config.accelerator_config
    settings = {
        "dataloader_num_workers": config.dataloader_num_workers,
        "auto_find_batch_size": config.auto_find_batch_size,
        "dispatch_batches": loading.dispatch_batches,
        "split_batches": loading.split_batches,
    }
    if given := [name for name, value in settings.items() if value]:
        raise ConfigurationError(f"--online answers in the training processes: leave out {', '.join(given)}")


def _check_new(job: TrainJob) -> None:
    """A new drafter: some families have no draft vocabulary to choose."""
    name = job.family or DEFAULT
    for field in job.drafter_options.keys() & _ELSEWHERE.keys():
        raise ConfigurationError(f"drafter_options: {field} is {_ELSEWHERE[field]}: leave it out")
    if family_named(name).drafts_all and job.draft_vocab_size is not None:
        raise ConfigurationError(
            f"draft_vocab_size: a drafter of family {name} can draft every token of the target: leave it out"
        )


def _check_given(job: TrainJob, folder: str) -> None:
    """A given drafter, which goes on, or starts one of another family: it decides most of the configuration."""
    if job.draft_vocab_size is not None:
        raise ConfigurationError(
            "draft_vocab_size is for a new drafter, and the given one has a vocabulary: leave it out, or set it to null"
        )
    family = family_of(folder)
    wanted = _wanted(job, family)
    if wanted is family and job.drafter_options:
        raise ConfigurationError(
            "drafter_options are for a new drafter, and the given one has a configuration: leave them out"
        )
    if wanted is not family and wanted.start is None:
        raise ConfigurationError(
            f"'{folder}' holds a {family.title}, from which no drafter of family {job.family} starts: "
            "leave out family to continue it, or leave out drafter for a new one"
        )
    if wanted is not family and job.online:
        raise ConfigurationError(
            f"--online continues the {family.title} in '{folder}': leave out family, or train without --online"
        )
