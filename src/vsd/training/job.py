"""`vsd train`: from a recipe to a trained drafter in a folder."""

import dataclasses
import gc
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from accelerate import PartialState
from transformers import set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from vsd.data import Example, load_examples
from vsd.drafters import Eagle3Drafter, draft_vocabulary
from vsd.errors import VSDError
from vsd.targets import EMBEDDED, Target, load_target
from vsd.training.batch import DraftDataset
from vsd.training.config import VSDConfig
from vsd.training.features import FeatureStore
from vsd.training.trainer import VSDTrainer

Text = TypeVar("Text")


def _option(default: Any, help_text: str) -> Any:
    return field(default_factory=lambda: default, metadata={"help": help_text})


@dataclass
class TrainJob:
    """What to train on what; how is `VSDConfig`."""

    target: str = _option(EMBEDDED, "hub id, folder or .gguf file of the target")
    data: list[str] = _option([], "training text, written by the target: JSONL files or hub datasets")
    output_dir: str = _option("runs/drafter", "folder for checkpoints, curves and the drafter")
    drafter: str | None = _option(None, "start from this drafter instead of from random weights")
    draft_vocab_size: int = _option(8192, "target tokens that can be drafted (default 8192)")
    max_length: int = _option(2048, "longest conversation, in tokens (default 2048)")
    held_out: int = _option(32, "conversations kept back to measure τ on while training (default 32)")
    features: str = _option(
        "store",
        "store: keep target features in the output folder; online: compute them in every step; or a folder that runs "
        "on the same text share",
    )
    on_bad_line: str = _option("fatal", "fatal: stop at an unusable line; skip: report it and go on")
    dtype: str = _option("auto", "precision of the target")
    device: str = _option("auto", "auto: the first GPU that is visible, if there is one; or cpu")

    def __post_init__(self) -> None:
        if isinstance(self.data, str):
            self.data = [self.data]
        for f in dataclasses.fields(self):
            value, kind = getattr(self, f.name), list if f.type == list[str] else f.type
            if not isinstance(value, kind):  # type: ignore[arg-type]
                raise VSDError(f"{f.name} takes {getattr(kind, '__name__', kind)}, not {value!r}")
        if self.on_bad_line not in ("fatal", "skip"):
            raise VSDError(f"on_bad_line must be one of fatal, skip, not '{self.on_bad_line}'")
        if self.features not in ("store", "online") and os.sep not in self.features:
            raise VSDError(
                f"features must be store, online or a folder such as ./{self.features}, not '{self.features}'"
            )

    @property
    def store(self) -> Path | None:
        """Where features are kept; None if they are not."""
        if self.features == "online":
            return None
        return Path(self.output_dir) / "features" if self.features == "store" else Path(self.features)

    @classmethod
    def options(cls) -> dict[str, tuple[dict[str, Any], str]]:
        """Command-line arguments of the fields: how argparse reads each, and its help."""
        kinds: dict[Any, dict[str, Any]] = {int: {"type": int}, list[str]: {"nargs": "+"}}
        return {f.name: (kinds.get(f.type, {}), f.metadata["help"]) for f in dataclasses.fields(cls)}


def recipe(path: Path | None, overrides: list[str], flags: dict[str, Any]) -> tuple[TrainJob, VSDConfig]:
    """A job and its configuration from a YAML file, KEY=VALUE overrides and command-line flags (strongest last).

    Raises:
        VSDError: unreadable file, unknown key, or a value that does not fit.
    """
    values: dict[str, Any] = _yaml(path) if path else {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise VSDError(f"--set takes KEY=VALUE, not '{override}'")
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise VSDError(f"--set {override}: not YAML: {' '.join(str(error).split())}") from error
    values |= flags
    mine = {f.name for f in dataclasses.fields(TrainJob)}
    theirs = {f.name for f in dataclasses.fields(VSDConfig) if f.init}
    unknown = sorted(set(values) - mine - theirs)
    if unknown:
        raise VSDError(f"unknown option {', '.join(unknown)}: see vsd train --help and transformers.TrainingArguments")
    job = TrainJob(**{key: value for key, value in values.items() if key in mine})
    if not job.data:
        raise VSDError("no training text: give --data FILE (make one with vsd data)")
    defaults = {"eval_strategy": "steps" if job.held_out else "no", "eval_steps": 250}
    kinds = {f.name: f.type for f in dataclasses.fields(VSDConfig)}
    own = {key: _meant(key, value, kinds[key]) for key, value in values.items() if key in theirs}
    if job.device == "cpu":
        own["use_cpu"] = True
    try:
        config = VSDConfig(**{**defaults, **own, "output_dir": job.output_dir})
    except (TypeError, ValueError) as error:
        raise VSDError(f"bad training option: {str(error).splitlines()[0]}") from error
    if job.device not in ("auto", str(config.device), config.device.type):
        raise VSDError(
            f"device '{job.device}': this process would train on {config.device}; "
            "CUDA_VISIBLE_DEVICES says which GPU that is, device: cpu takes none"
        )
    return job, config


def train(job: TrainJob, config: VSDConfig, *, resume: bool, report: Callable[[str], None] | None = None) -> Path:
    """Run a job; returns the folder of the trained drafter.

    Raises:
        VSDError: bad data or target, or an output folder that holds another run and `resume` was not asked for.
    """
    checkpoint = _checkpoint(job, resume)
    target = load_target(job.target, dtype=job.dtype, device=str(config.device))  # each process has its own GPU
    start = None
    if job.drafter is not None:
        start = Eagle3Drafter.from_pretrained(job.drafter, device_map=target.device)
        target.take_features(start.config.aux_layers)
    examples = [
        example
        for source in job.data
        for example in load_examples(source, target.tokenizer, job.max_length, job.on_bad_line, report)  # type: ignore[arg-type]
    ]
    kept, held_out = hold_out(examples, job.held_out)
    dataset = DraftDataset(kept)
    set_seed(config.seed)
    drafter = start or _new_drafter(job, target, dataset)
    folder = Path(job.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps(dataclasses.asdict(job), indent=1))
    store, processes = None, PartialState()
    if job.store:
        worker = processes.process_index, processes.num_processes
        store = FeatureStore.build(job.store, target, kept, config.temperature, worker)
        processes.wait_for_everyone()
    trainer = VSDTrainer(target, drafter, config, dataset, store=store, eval_prompts=[prompt_of(e) for e in held_out])
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(folder / "drafter"))
    trainer.save_state()  # with all that was logged
    return folder / "drafter"


def end_processes() -> None:
    """Part from the other processes of a run, if there are any: at its end, with its trainer gone.

    A wrapped model holds on to the process group, and gloo's threads with it. One that frees a tensor while Python
    shuts down aborts its process, and a finished run counts as failed. Not for a run that did fail: the others may
    be waiting inside a collective, and would wait for ever.
    """
    gc.collect()  # a trainer is in a cycle with its callbacks
    PartialState().destroy_process_group()


def hold_out(examples: list[Text], count: int) -> tuple[list[Text], list[Text]]:
    """(training, held-out) examples or conversations; the held-out ones are spread evenly over the text."""
    if count >= len(examples):
        raise VSDError(f"{count} of {len(examples)} conversations are to be held out: nothing is left to train on")
    picked = {i * len(examples) // count for i in range(count)}
    return [e for i, e in enumerate(examples) if i not in picked], [examples[i] for i in sorted(picked)]


def prompt_of(example: Example) -> list[int]:
    """The tokens before the first answer."""
    return example.inputs.ids[: example.drafted.index(True) - 1]


def _new_drafter(job: TrainJob, target: Target, dataset: DraftDataset) -> Eagle3Drafter:
    size = min(job.draft_vocab_size, target.vocab_size)
    return Eagle3Drafter.for_target(target, draft_vocabulary(dataset.drafted_tokens(), target.vocab_size, size))


def _checkpoint(job: TrainJob, resume: bool) -> str | None:
    """The last complete checkpoint: the trainer's state is written last, so a kill meanwhile leaves none."""
    folder = Path(job.output_dir)
    if folder.is_dir() and get_last_checkpoint(str(folder)) is not None and not resume:
        raise VSDError(f"'{folder}' holds a run already: add --resume to continue it, or give another --output-dir")
    complete = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/trainer_state.json") if _is_json(path)]
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except ValueError:
        return False
    return True


def _yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise VSDError(f"no recipe at '{path}'") from None
    except yaml.YAMLError as error:
        raise VSDError(f"'{path}' is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise VSDError(f"'{path}' must hold KEY: VALUE lines")
    return values


def _meant(name: str, value: Any, kind: Any) -> Any:
    """YAML 1.1 reads 1e-3 as a string and no as false; people mean the number, and the strategy called "no"."""
    if value is False and name.endswith("_strategy"):
        return "no"
    if not isinstance(value, str) or kind not in (int, float, int | None, float | None):
        return value
    try:
        number = float(value)
    except ValueError:
        raise VSDError(f"{name} must be a number, not '{value}'") from None
    return int(number) if number.is_integer() else number
