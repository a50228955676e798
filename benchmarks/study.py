"""Compare objectives: one drafter, trained further with each for the same wall-clock time, then measured.

    python benchmarks/study.py --text TEXT … --start DRAFTER --prompts FILE … --out runs/study \\
        [--target T] [--control eagle3] [--objectives eagle3 vsd …] [--minutes 10] [--seeds 0] [--limit 24]
        [--temperatures 0 1] [--speed 8]

Every pair (objective, seed) is one `vsd train` from the same drafter, text and features; the time of the E-step
counts. Then every drafter drafts along the same answers of the target, by replay (`vsd.decoding.replay`): with trees,
with a chain and, above temperature 0, with a chain verified by rejection sampling. Reported are τ and its ratio to the
control, the family's own objective trained further with the same seeds, with 95 % paired bootstrap intervals over
prompts; seeds are pooled. Measured is the drafter of a run with the highest held-out τ, or with --measure last the one
at its end: the held-out conversations are of the training text, and --prompts may be of another kind. --speed N: the
drafters of the first seed also answer N prompts of each file in the decoder, alternately, with the first of
--decodings. Results are stored in --out; an interrupted command can be repeated.

"new states only" trains on continuations alone, without recorded paths. "eagle3, more answers" uses the first third of
its minutes for further answers of the target to the prompts of the text.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from acceptance import Turn, per_prompt, plain_answers, replay_of
from vsd.allocator import keep_freed_memory
from vsd.data import TargetTeacher, prompt_inputs, read_conversations, regenerate
from vsd.decoding import Engine, Replay, Sampling
from vsd.drafters import load_drafter
from vsd.evaluation import Prompt, load_prompts, write_json
from vsd.evaluation.bootstrap import Counts, pooled_rate, ratio_interval
from vsd.paths import TreeShape
from vsd.targets import Target, load_target

Read = tuple[list[Turn], Replay]

MORE_ANSWERS = "eagle3, more answers"
SOMETIMES = {"anchors": 4, "every": 2, "weight": 0.5}
DRAFTED = {"e_step": "drafted", "samples": 8, **SOMETIMES}
FULL = {"arw": True, "car": 0.5}  # the paper's M-step, in our reading
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "eagle3": ("eagle3", {}),
    "vispec": ("vispec", {}),
    MORE_ANSWERS: ("eagle3", {}),
    "eagle3, cut paths": ("eagle3", {"smoothing": 0.3}),
    "lk_lambda": ("lk_lambda", {}),
    "dpace": ("dpace", {}),
    "vat": ("vat", {}),
    "griffin": ("griffin", {}),
    "elbo": ("elbo", {"rule": "rejection"}),
    "gto": ("gto", {}),
    "gto, target": ("gto", {"rule": "target"}),
    "vsd": ("vsd", {}),
    "vsd, 8 epochs": ("vsd", {"epochs": 8}),
    "vsd, new states only": ("vsd", {"recorded": False}),
    "vsd, new states only, 8 epochs": ("vsd", {"recorded": False, "epochs": 8}),
    "vsd, new states only, 32 of 8 tokens": ("vsd", {"recorded": False, "anchors": 32, "length": 8}),
    "vsd, new states only, 8 of 8 tokens": ("vsd", {"recorded": False, "anchors": 8, "length": 8}),
    "vsd, new states only, 32 anchors": ("vsd", {"recorded": False, "anchors": 32}),
    "vsd, new states only, 32 tokens": ("vsd", {"recorded": False, "length": 32}),
    "vsd with ARW": ("vsd", {"arw": True}),
    "vsd with CAR": ("vsd", {"car": 0.5}),
    "vsd with ARW and CAR": ("vsd", FULL),
    "ARW": ("vsd", {"arw": True, "e_step": None}),
    "ARW, alpha 0": ("vsd", {"arw": True, "alpha": 0.0, "e_step": None}),
    "ARW, rejection": ("vsd", {"rule": "rejection", "arw": True, "e_step": None}),
    "ARW and CAR": ("vsd", {**FULL, "e_step": None}),
    "ARW and CAR, hard labels": ("vsd", {**FULL, "hard": True, "e_step": None}),
    "ARW and CAR, beyond lookup": ("vsd", {**FULL, "lookup": True, "e_step": None}),
    "ARW, cut paths": ("vsd", {"arw": True, "smoothing": 0.05, "e_step": None}),
    "ARW and CAR, tree": ("vsd", {**FULL, "hard": True, "cut": -3.0, "e_step": None}),
    "vsd, target": ("vsd", {"rule": "target"}),
    "vsd, target, drafted": ("vsd", {"rule": "target", **FULL, **DRAFTED}),
    "vsd, target, trees": ("vsd", {"rule": "target", **FULL, "e_step": "trees", **SOMETIMES}),
    "vsd, rejection": ("vsd", {"rule": "rejection"}),
    "vsd, rejection, with ARW": ("vsd", {"rule": "rejection", "arw": True}),
    "vsd, rejection, drafted": ("vsd", {"rule": "rejection", **FULL, **DRAFTED}),
}
DECODINGS: dict[str, tuple[TreeShape, str, bool]] = {  # shape, verification, whether also at temperature 0
    "tree": (TreeShape(5, 4, 16), "auto", True),
    "lookup": (TreeShape(4, 4, 12, 0.03, 8), "auto", True),
    "chain": (TreeShape.chain(4), "auto", True),
    "rejection": (TreeShape.chain(4), "rejection", False),
}
REJECTION_SEEDS = 2  # replays of a chain verified by rejection sampling


_TRAINING = ("target", "text", "start", "minutes", "learning_rate", "draft_steps", "batch_size", "held_out")
SETTINGS = (*_TRAINING, "prompts", "limit", "max_new_tokens")  # that all runs of a study share


def check_settings(a: argparse.Namespace, names: Sequence[str]) -> None:
    """Exit if the runs in --out have other settings of these names."""
    settings, path = {name: getattr(a, name) for name in names}, a.out / "settings.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        sys.exit(f"{a.out} holds a study with other settings ({path}): give another --out")
    a.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1))


def train(name: str, seed: int, a: argparse.Namespace) -> Path:
    """The folder of one run; trains its drafter unless it exists."""
    folder: Path = a.out / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
    objective, options = VARIANTS[name]
    variant, path = [objective, options], folder / "variant.json"
    if path.exists() and json.loads(path.read_text()) != variant:
        sys.exit(f"{folder} was trained with other options of '{name}': delete it, or give another --out")
    if not (folder / "drafter" / "model.safetensors").exists():
        for checkpoint in folder.glob("checkpoint-*"):  # of an interrupted run, which begins anew: its time counts
            shutil.rmtree(checkpoint)
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(variant))
        text, features, minutes = a.text, a.features or a.out / "features", a.minutes
        if name == MORE_ANSWERS:
            more, spent = more_answers(folder, seed, a)
            text, features, minutes = [*text, *more], folder / "features", minutes - spent
        words = [sys.executable, "-m", "vsd.cli", "train", "--target", a.target, "--drafter", a.start, "--data", *text]
        words += ["--output-dir", folder, "--features", features]
        words += ["--on-bad-line", "skip", "--held-out", a.held_out]
        words += ["--set", f"objective={objective}", f"objective_options={json.dumps(options)}", f"seed={seed}"]
        words += [f"max_minutes={minutes}", f"learning_rate={a.learning_rate}"]
        words += [
            "save_strategy=steps",
            "save_steps=0.5",
            "save_total_limit=1",
            "eval_steps=0.2",
            "eval_max_new_tokens=48",
            f"draft_steps={a.draft_steps}",
        ]
        words += [f"per_device_train_batch_size={a.batch_size}"]
        with (folder / "log.txt").open("w") as log:
            subprocess.run([str(word) for word in words], check=True, stdout=log, stderr=subprocess.STDOUT)
    return folder


def more_answers(folder: Path, seed: int, a: argparse.Namespace) -> tuple[list[str], float]:
    """Files with further answers of the target to all prompts of the text, sampled at T = 1, and the minutes needed."""
    path = folder / "more.json"
    if not path.exists():
        prompts = [chat for text in a.text for chat in read_conversations(text, on_bad_line="skip")]
        target, files, minutes = load_target(a.target), list[str](), 0.0
        start = time.perf_counter()
        while minutes < a.minutes / 3:
            files.append(str(folder / f"more-{len(files)}.jsonl"))
            Path(files[-1]).unlink(missing_ok=True)  # from an interrupted run: its time is unknown
            number = 1000 * seed + len(files)
            teacher = TargetTeacher(target)
            regenerate(teacher, prompts, Path(files[-1]), temperature=1.0, seed=number, on_bad_line="skip")
            minutes = (time.perf_counter() - start) / 60
        path.write_text(json.dumps([files, minutes]))
    files, minutes = json.loads(path.read_text())
    return files, minutes


def drafter_of(folder: Path, a: argparse.Namespace) -> Path:
    """The drafter of a run that is measured."""
    if a.measure == "best":
        return folder / "drafter"
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    if not checkpoints:
        sys.exit(f"{folder} has no checkpoint, so it is older than --measure last: delete it, or give another --out")
    return checkpoints[-1]


def results_file(name: str, a: argparse.Namespace) -> str:
    """Name of a file of results; those of --measure last lie beside the others."""
    return f"{'' if a.measure == 'best' else 'last-'}{name}.json"


def decode(folder: Path, target: Target, read: Callable[[float], Read], a: argparse.Namespace) -> None:
    """Write new tokens and passes of every prompt."""
    drafter = None
    for temperature in a.temperatures:
        for name, (shape, verification, greedy_too) in DECODINGS.items():
            path = folder / results_file(f"{name}-{temperature:g}", a)
            if path.exists() or name not in a.decodings or (temperature == 0 and not greedy_too):
                continue
            drafter = drafter or load_drafter(drafter_of(folder, a), target)
            turns, replay = read(temperature)
            seeds = range(REJECTION_SEEDS if verification == "rejection" else 1)
            own = shape_for(drafter, shape)
            found = [per_prompt(turns, replay(drafter, own, verification, seed)) for seed in seeds]
            path.write_text(json.dumps(np.sum(found, 0).T.tolist()))


def shape_for(drafter: Any, shape: TreeShape) -> TreeShape:
    """A block drafter drafts blocks of the length that it is trained for: another length has another q."""
    if not drafter.one_pass:
        return shape
    steps = drafter.config.draft_steps
    return TreeShape.chain(steps) if shape.top_k == 1 else replace(shape, depth=steps)


def speed(runs: dict[str, list[Path]], target: Target, prompts: Sequence[Prompt], a: argparse.Namespace) -> None:
    """Write new tokens and seconds of every prompt by temperature and objective, one request at a time."""
    path, shape = a.out / results_file("speed", a), DECODINGS[a.decodings[0]][0]
    if path.exists():
        return
    drafters = {name: load_drafter(drafter_of(folders[0], a), target) for name, folders in runs.items()}
    engines = [Engine(target, drafter, shape_for(drafter, shape)) for drafter in drafters.values()]
    questions = [
        prompt_inputs(target.tokenizer, [{"role": "user", "content": prompt.turns[0]}], target.images)
        for prompt in prompts
    ]
    for engine in engines:  # warm-up
        engine.generate(questions[:1], Sampling(a.max_new_tokens))
    found = {}
    for temperature in a.temperatures:
        spent = np.zeros((len(engines), len(questions), 2))
        for n, asked in enumerate(questions):
            for i in [(i + n) % len(engines) for i in range(len(engines))]:
                start = time.perf_counter()
                (result,) = engines[i].generate([asked], Sampling(a.max_new_tokens, temperature, seed=n))
                spent[i, n] = len(result.tokens), time.perf_counter() - start
        found[f"{temperature:g}"] = {name: spent[i].tolist() for i, name in enumerate(drafters)}
    path.write_text(json.dumps(found))


def speed_rows(a: argparse.Namespace) -> list[dict[str, Any]]:
    """Tokens per second of every objective, and the ratio to the control."""
    rows = []
    for temperature, found in json.loads((a.out / results_file("speed", a)).read_text()).items():
        base = np.array(found[a.control]).T
        for name, spent in found.items():
            mine = np.array(spent).T
            row = {"objective": name, "temperature": temperature, "tokens_per_second": pooled_rate(*mine)}
            rows.append(row | ratio(mine, base))
    return rows


def ratio(mine: Counts, base: Counts) -> dict[str, Any]:
    """Ratio of two rates with its interval, as fields of a row. Arguments: [2, prompts] each."""
    return {"ratio": pooled_rate(*mine) / pooled_rate(*base), "ratio_ci": ratio_interval(*mine, *base)}


def formatted_ratio(row: dict[str, Any]) -> str:
    """Ratio and interval of a row."""
    low, high = row["ratio_ci"]
    return f"{row['ratio']:.3f} [{low:.3f}, {high:.3f}]"


def counts(folders: Sequence[Path], name: str) -> Counts:
    """New tokens and passes of every prompt, [prompts, 2], summed over seeds."""
    summed: Counts = np.sum([json.loads((folder / name).read_text()) for folder in folders], axis=0)
    return summed


def report(runs: dict[str, list[Path]], a: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each objective, decoding and temperature."""
    rows = []
    for temperature in a.temperatures:
        for name in a.decodings:
            file = results_file(f"{name}-{temperature:g}", a)
            have = {variant: folders for variant, folders in runs.items() if all((f / file).exists() for f in folders)}
            if a.control not in have:
                continue
            base = counts(have[a.control], file).T
            for variant, folders in have.items():
                mine = counts(folders, file).T
                rows.append(
                    {
                        "objective": variant,
                        "decoding": name,
                        "temperature": temperature,
                        "tau": pooled_rate(*mine),
                        "seeds": len(folders),
                    }
                    | ratio(mine, base)
                )
    return rows


def show(rows: list[dict[str, Any]], control: str) -> None:
    table = Table(title="τ after equal training time from the same drafter")
    for column in ("objective", "decoding", "T", "τ", f"× {control}"):
        table.add_column(column)
    for row in rows:
        temperature, tau = f"{row['temperature']:g}", f"{row['tau']:.3f}"
        table.add_row(row["objective"], row["decoding"], temperature, tau, formatted_ratio(row))
    Console(width=120).print(table)


def show_speed(rows: list[dict[str, Any]], control: str) -> None:
    table = Table("objective", "T", "tokens/s", f"× {control}", title="one request at a time, drafters alternate")
    for row in rows:
        table.add_row(row["objective"], row["temperature"], f"{row['tokens_per_second']:.1f}", formatted_ratio(row))
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", required=True, help="training text written by the target")
    parser.add_argument("--start", required=True, help="drafter that all runs start from")
    parser.add_argument("--prompts", nargs="+", required=True, help="prompt files of the measurement")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--features", help="folder of the text's features (default OUT/features)")
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--control", choices=VARIANTS, default="eagle3", metavar="NAME", help="one of --objectives")
    parser.add_argument("--objectives", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--decodings", nargs="+", choices=DECODINGS, default=list(DECODINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--draft-steps", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=48, help="held-out conversations, as in the training of START")
    parser.add_argument(
        "--measure", choices=["best", "last"], default="best", help="drafter by held-out τ, or at the end"
    )
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 1.0])
    parser.add_argument("--limit", type=int, help="prompts of each file")
    parser.add_argument("--speed", type=int, default=0, help="prompts of each file to time (default none)")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    a = parser.parse_args()
    if a.control not in a.objectives:
        parser.error(f"the control is missing: add {a.control} to --objectives")
    check_settings(a, SETTINGS)
    keep_freed_memory()
    runs = {name: [train(name, seed, a) for seed in a.seeds] for name in a.objectives}
    target = load_target(a.target)
    prompts = load_prompts(a.prompts, a.limit)

    @cache
    def read(temperature: float) -> Read:
        path = a.out / f"answers-{temperature:g}.json"
        turns = plain_answers(target, prompts, a.max_new_tokens, path, temperature)
        return turns, replay_of(target, turns, temperature)

    for folders in runs.values():
        for folder in folders:
            decode(folder, target, read, a)
    found: dict[str, Any] = {"rows": report(runs, a), "settings": {k: str(v) for k, v in vars(a).items()}}
    show(found["rows"], a.control)
    if a.speed:
        speed(runs, target, load_prompts(a.prompts, a.speed), a)
        found["speed"] = speed_rows(a)
        show_speed(found["speed"], a.control)
    write_json(found, a.out / results_file("study", a))


if __name__ == "__main__":
    main()
