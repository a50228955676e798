"""`vsd train`: from a recipe to a trained drafter in a folder."""

import gc
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from vsd.data import Example, Examples, training_text
from vsd.drafters import new_drafter
from vsd.drafters.load import adopted_drafter, family_for, family_named, start_drafter
from vsd.errors import ConfigurationError, MismatchError, VSDError
from vsd.features import FeatureServer, FeatureSource, FeatureStore, KeptFeatures, ServedFeatures, TextStore
from vsd.files import alone, writing
from vsd.objective import objective
from vsd.options import TrainJob, draft_vocabulary_size
from vsd.targets import Inputs, Target, TargetInfo, load_target, load_target_info
from vsd.targets.split import SPLIT
from vsd.training.applicable import check_applicable
from vsd.training.batch import DraftDataset, announced
from vsd.training.config import VSDConfig
from vsd.training.online import OnlineText, load_prompts
from vsd.training.recipe import check_resumable, check_same_text, write_recipe
from vsd.training.trainer import VSDTrainer

Texts = TypeVar("Texts", bound=Sequence[Any])

_LARGE = 1e9  # parameters of a target whose features outgrow disks: one of 8 billion has 33 kB a token


def train(job: TrainJob, config: VSDConfig, *, resume: bool, report: Callable[[str], None] | None = None) -> Path:
    """Run a job; returns the folder of the trained drafter.

    Raises:
        VSDError: bad data or target, or an output folder that holds another run while `resume` is False.
    """
    with ExitStack() as held:
        return _train(job, config, resume, report, held)


def _train(
    job: TrainJob, config: VSDConfig, resume: bool, report: Callable[[str], None] | None, held: ExitStack
) -> Path:
    """As `train`; `held` ends with the run."""
    check_applicable(job, config)
    checkpoint = _checkpoint(job, resume)
    if checkpoint is not None:
        check_resumable(Path(job.output_dir), job, config)
    if job.online:
        checkpoint = _begin(job, config, resume, held)
        return _finish(_online(job, config, report), job, checkpoint)
    where = _where(job, config)
    info = load_target_info(job.target, **where)
    examples = training_text(
        job.data, info, job.max_length, job.on_bad_line, report, download_images=job.download_images
    )
    kept, held_out = hold_out(examples, job.held_out, examples.openings)
    if len(held_out) > job.held_out and PartialState().is_main_process:
        print(f"{job.held_out} conversations with {len(held_out)} of {len(examples)} texts are held out")
    dataset = DraftDataset(kept)
    served = job.server is not None or (job.store is not None and TextStore.is_at(job.store))
    stored = served or (job.store is not None and FeatureStore.complete(job.store, kept))
    PartialState().wait_for_everyone()  # all processes list the shards before any process adds one
    trained = objective(config.objective, config.objective_options)
    whole = held_out or not stored or trained.needs_target or (trained.continues and job.server is None)
    target = load_target(job.target, **where) if whole else info  # of `info` no weight has been read yet
    set_seed(config.seed)
    drafter = _drafter(job, target, dataset)
    checkpoint = _begin(job, config, resume, held, kept.digest)
    features = _features(job, target, kept, drafter.needs.layers, config.temperature, trained.continues and not whole)
    if isinstance(features, ServedFeatures):
        held.callback(features.close)
    trainer = VSDTrainer(
        target,
        drafter,
        config,
        dataset,
        features=features,
        eval_prompts=distinct(map(prompt_of, held_out)),
    )
    if isinstance(features, ServedFeatures):
        trainer.data_collator = announced(features.expect)
    return _finish(trainer, job, checkpoint)


def _online(job: TrainJob, config: VSDConfig, report: Callable[[str], None] | None) -> VSDTrainer:
    """The trainer of a job that answers its prompts itself."""
    assert job.drafter is not None
    target = load_target(job.target, **_where(job, config))
    room = job.max_length - job.answer_tokens
    found = [
        one for source in job.data for one in load_prompts(source, target.tokenizer, room, job.on_bad_line, report)
    ]
    kept, held_out = hold_out(found, job.held_out, [one.opening for one in found])
    prompts, measured = ([one.inputs for one in some] for some in (kept, held_out))
    set_seed(config.seed)
    drafter = _given(job.drafter, target)
    folder = Path(job.output_dir) / "online"
    texts = OnlineText(folder, target, drafter, prompts, job, temperature=config.temperature, seed=config.seed)
    return VSDTrainer(target, drafter, config, texts, features=texts, eval_prompts=distinct(measured))


def _where(job: TrainJob, config: VSDConfig) -> dict[str, Any]:
    """How the target is loaded: each process has its own GPU, and one process alone may spread it over all."""
    if job.device != SPLIT:
        return {**job.loading, "device": str(config.device)}
    if (count := PartialState().num_processes) > 1:
        raise ConfigurationError(f"--device split is for one process, and there are {count}: start one")
    return job.loading


def _begin(job: TrainJob, config: VSDConfig, resume: bool, held: ExitStack, text: str | None = None) -> str | None:
    """Hold the output folder for this run and write the recipe; returns the checkpoint from which the run goes on.

    Args:
        text: digest of the training text; None for online training, whose rounds have one.
    """
    folder, first = Path(job.output_dir), PartialState().is_main_process
    if first:
        held.enter_context(alone(folder))
    checkpoint = _checkpoint(job, resume)  # once more: another run may have ended since
    if checkpoint is not None:
        check_same_text(folder, text)
    PartialState().wait_for_everyone()  # before the recipe is written, all have compared theirs with the old one
    if first:
        write_recipe(folder, job, config, text)
    return checkpoint


def _finish(trainer: VSDTrainer, job: TrainJob, checkpoint: str | None) -> Path:
    """Train, and write the drafter with the highest τ; where none was measured, the last one."""
    folder = Path(job.output_dir)
    with writing(folder), _sound(checkpoint):
        trainer.train(resume_from_checkpoint=checkpoint)
        if job.held_out and trainer.state.global_step not in trainer.measured:
            trainer.evaluate()
        if job.held_out:
            trainer.accelerator.wait_for_everyone()
            if trainer.is_world_process_zero():
                shutil.copytree(trainer.best, folder / "drafter", dirs_exist_ok=True)
        else:
            trainer.save_model(str(folder / "drafter"))
        trainer.save_state()  # includes the log history
    if trainer.is_world_process_zero() and (line := trainer.advice()) is not None:
        print(line)
    return folder / "drafter"


@contextmanager
def _sound(checkpoint: str | None) -> Iterator[None]:
    """Errors of a checkpoint whose pickles hold something else than tensors, or are damaged; no code in them is run."""
    try:
        yield
    except (UnpicklingError, EOFError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise
        raise MismatchError(f"'{checkpoint}' is damaged: delete it, and --resume continues from another") from error


def _features(
    job: TrainJob, target: TargetInfo, examples: Examples, layers: tuple[int, ...], temperature: float, continues: bool
) -> FeatureSource | None:
    """The server or the store of a job, a store's missing shards computed by all processes; None: the target itself.

    Args:
        continues: whether a server will be asked for continuations.
    """
    if job.server is not None:
        server = FeatureServer(job.server, None, None, target, temperature if continues else 0.0)
        server.check()
        return ServedFeatures(server, layers, temperature)
    if job.store is None:
        return None
    if TextStore.is_at(job.store):
        return KeptFeatures(TextStore(job.store, target), target, examples, layers, temperature)
    if not isinstance(target, Target):
        return FeatureStore(job.store, target, examples, layers, temperature)
    processes, reason = PartialState(), None
    if processes.is_main_process:
        missing = FeatureStore.missing_bytes(job.store, target, examples, layers)
        reason = _against_storing(target, job.store, missing) if job.features == "auto" else None
        if missing:
            stored = f"{missing / 1e9:.2f} GB, stored in {job.store}"
            print("target features:", f"computed in every step, as {reason}" if reason else stored)
    (reason,) = broadcast_object_list([reason])
    if reason:
        return None
    worker = processes.process_index, processes.num_processes
    return FeatureStore.build(job.store, target, examples, layers, temperature, worker, processes.wait_for_everyone)


def _against_storing(target: Target, folder: Path, missing: int) -> str | None:
    """Why `missing` bytes of features should not be added to a store; None if they should."""
    if missing and target.parameters > _LARGE:
        return f"the target has {target.parameters / 1e9:.1f} billion parameters (--features store stores them)"
    free = shutil.disk_usage(folder.parent).free
    return f"they take {missing / 1e9:.1f} GB and {free / 1e9:.1f} GB are free" if missing > free else None


def end_processes() -> None:
    """Destroy the process group, if there is one, at the end of a run, after the trainer is deleted.

    A wrapped model keeps the process group and gloo's threads alive. A thread that frees a tensor during Python's
    shutdown aborts its process, and a finished run then counts as failed. Do not call this function after a failure:
    other processes may wait inside a collective, and the call would block.
    """
    gc.collect()  # trainer and callbacks form a reference cycle
    PartialState().destroy_process_group()


def hold_out(texts: Texts, count: int, openings: Any = None) -> tuple[Texts, Texts]:
    """(training, held-out) texts; the held-out conversations are spread evenly over all.

    Args:
        openings: what the texts of one conversation have in common, [n]; they are held out together. By default every
            text is a conversation of its own.

    Raises:
        VSDError: nothing is left to train on.
    """
    _, first, belongs = np.unique(
        range(len(texts)) if openings is None else openings, return_index=True, return_inverse=True
    )
    size = len(first)
    if count >= size:
        raise VSDError(
            f"{count} of {size} conversations are to be held out, and nothing is left to train on: give a lower "
            "--held-out, or more text (texts with the same first prompt are one conversation)"
        )
    picked = np.argsort(first)[[i * size // count for i in range(count)]]  # among the conversations in their order
    held_out = np.isin(belongs, picked)
    return _chosen(texts, np.flatnonzero(~held_out)), _chosen(texts, np.flatnonzero(held_out))


def _chosen(texts: Any, indices: Any) -> Any:
    return texts.chosen(indices) if isinstance(texts, Examples) else [texts[i] for i in indices]


def distinct(prompts: Iterable[Inputs]) -> list[Inputs]:
    """Every prompt once, in their order."""
    return list({(*prompt.ids, prompt.digest): prompt for prompt in prompts}.values())


def prompt_of(example: Example) -> Inputs:
    """The inputs before the first drafted answer."""
    return example.inputs.upto(example.drafted.index(True) - 1)


def _drafter(job: TrainJob, target: TargetInfo, dataset: DraftDataset) -> Any:
    """The drafter to train: a given one, one that starts from a given one of another family, or a new one."""
    options = job.drafter_options
    if job.drafter is None:
        size = draft_vocabulary_size(job.draft_vocab_size, target.hidden_size, target.vocab_size)
        return new_drafter(target, dataset.draft_vocabulary(target.vocab_size, size), job.family, **options)
    drafter = _given(job.drafter, target)
    if job.family is not None and family_for(drafter) is not family_named(job.family):
        return start_drafter(drafter, target, job.family, **options)
    return drafter


def _given(path: str, target: TargetInfo) -> Any:
    """The drafter that a job continues from, of this target or of another one of the same sizes."""
    drafter, adopted = adopted_drafter(path, target)
    if adopted:
        print(f"'{path}' was trained for another target of these sizes; it is trained further for this one")
    return drafter


def _checkpoint(job: TrainJob, resume: bool) -> str | None:
    """The last complete checkpoint: one with the trainer's state, which is written last.

    Raises:
        VSDError: the folder holds a run that is not to be resumed, or one that ended without checkpoints.
    """
    folder = Path(job.output_dir)
    ended = (folder / "trainer_state.json").exists()  # written last
    if not resume and (ended or (folder.is_dir() and get_last_checkpoint(str(folder)) is not None)):
        raise VSDError(f"'{folder}' holds a run already: add --resume to continue it, or give another --output-dir")
    complete = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/trainer_state.json") if _is_json(path)]
    if ended and not complete:
        raise VSDError(
            f"'{folder}' holds a run that ended without checkpoints, which --resume needs: give another --output-dir, "
            f"and --drafter {folder / 'drafter'} to train its drafter further"
        )
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except ValueError:
        return False
    return True
