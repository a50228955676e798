"""Which command makes a drafter better on given traffic? Equal minutes from one drafter, everything counted.

    python benchmarks/adapt.py --start DRAFTER --prompts train_prompts.jsonl --traffic gsm8k_train --count 100 \\
        --out runs/adapt [--logs LOGS.jsonl] [--minutes 10] [--seeds 0] [--arms start regenerate online …]

Traffic is what the lines of --prompts have as "source": --count prompts to adapt to, --limit others of the same
traffic to measure on, and --limit of all other sources (is anything forgotten?). Arms:

    start           the drafter as it is
    logs            `eagle3` on --logs, answers of people or of another model to such prompts
    vsd on logs     `vsd` on --logs
    regenerate      the target answers the prompts greedily, then `eagle3`
    several draws   the target answers the prompts at T = 1, again and again for a third of the minutes, then `eagle3`
    vsd             the target answers the prompts greedily, then `vsd` with its E-step
    continuations   the same with `vsd` on alternative continuations alone: 8, of 8 tokens each, for each text
    online          `vsd train --online` with `eagle3`'s objective: decoding is the E-step
    online greedy   the same with answers at T = 0
    online vsd      `vsd train --online` with `vsd` and its E-step

Minutes are wall-clock time of answering, features, E-steps and training; loading of models is not counted. Answers that
several arms train on are made once, and their minutes count in each of these arms. τ is measured by replay on the
target's answers at T = 0 and T = 1, with 95 % paired bootstrap intervals of its ratio to `regenerate`; seeds are
pooled. Results are stored in --out; an interrupted command can be repeated.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from acceptance import Turn, per_prompt, plain_answers, replay_of
from study import DECODINGS, Read, check_settings, counts, formatted_ratio, ratio, shape_for
from vsd.allocator import keep_freed_memory
from vsd.data import TargetTeacher, load_examples, read_conversations, regenerate
from vsd.drafters import load_drafter
from vsd.evaluation import Prompt, load_prompts, write_json
from vsd.evaluation.bootstrap import pooled_rate
from vsd.features import FeatureStore
from vsd.targets import load_target

CONTROL = "regenerate"
LONGEST = 1024  # tokens of a text
CONTINUATIONS = {"recorded": False, "anchors": 8, "length": 8}
TRAINED: dict[str, tuple[str, str, dict[str, Any]]] = {  # arm: its text, its objective and the objective's options
    "logs": ("logs", "eagle3", {}),
    "vsd on logs": ("logs", "vsd", {}),
    "regenerate": ("greedy", "eagle3", {}),
    "several draws": ("sampled", "eagle3", {}),
    "vsd": ("greedy", "vsd", {}),
    "continuations": ("greedy", "vsd", CONTINUATIONS),
    "online": ("online", "eagle3", {}),
    "online greedy": ("online", "eagle3", {}),
    "online vsd": ("online", "vsd", {}),
}
ARMS = ("start", *TRAINED)
SETTINGS = ("start", "prompts", "traffic", "count", "limit", "logs", "minutes", "answer_tokens", "learning_rate")


def split_prompts(a: argparse.Namespace) -> dict[str, Path]:
    """Files of the prompts to adapt to ("train"), of others of the traffic, and of other sources ("general")."""
    lines = [json.loads(line) for line in Path(a.prompts).read_text().splitlines()]
    mine = [line for line in lines if line["source"] == a.traffic]
    others = [line for line in lines if line["source"] != a.traffic]
    if len(mine) < a.count + a.limit:
        sys.exit(f"{a.prompts} has {len(mine)} prompts of source {a.traffic}, not {a.count} + {a.limit}")
    every = len(others) // a.limit
    parts = {"train": mine[: a.count], "traffic": mine[-a.limit :], "general": others[::every][: a.limit]}
    files = {name: a.out / f"{name}.jsonl" for name in parts}
    for name, part in parts.items():
        files[name].write_text("".join(json.dumps(line) + "\n" for line in part))
    return files


def answered(text: str, seed: int, prompts: Path, a: argparse.Namespace) -> tuple[Path, list[str], float]:
    """A folder with features of a training text, its files, and the minutes that both took; made once for all arms."""
    folder: Path = a.out / f"text-{text}-{seed}"
    done = folder / "minutes.json"
    if not done.exists():
        folder.mkdir(exist_ok=True)
        for path in folder.glob("answers-*"):  # from an interrupted run: its time is unknown
            path.unlink()
        shutil.rmtree(folder / "features", ignore_errors=True)
        target, asked = load_target(), list(read_conversations(prompts, need_answer=False))
        start, files = time.perf_counter(), [str(a.logs)] if text == "logs" else []
        while not files or (text == "sampled" and time.perf_counter() - start < 60 * a.minutes / 3):
            path = folder / f"answers-{len(files)}.jsonl"
            choice: dict[str, Any] = {"temperature": float(text == "sampled"), "seed": 1000 * seed + len(files)}
            choice |= {"max_new_tokens": a.answer_tokens, "max_length": LONGEST}
            regenerate(TargetTeacher(target), asked, path, on_bad_line="skip", **choice)
            files.append(str(path))
        examples = [e for file in files for e in load_examples(file, target.tokenizer, LONGEST, "skip")]
        FeatureStore.build(folder / "features", target, examples, load_drafter(a.start, target).needs.layers)
        done.write_text(json.dumps([files, (time.perf_counter() - start) / 60]))
    files, minutes = json.loads(done.read_text())
    return folder / "features", files, minutes


def train(arm: str, seed: int, prompts: Path, a: argparse.Namespace) -> Path:
    """The folder of one run; trains its drafter unless it exists."""
    folder: Path = a.out / f"{arm.replace(' ', '-')}-{seed}"
    if arm == "start" or (folder / "drafter" / "config.json").exists():
        return folder
    text, objective, options = TRAINED[arm]
    folder.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "vsd.cli", "train", "--drafter", a.start, "--output-dir", folder]
    words += ["--objective", objective, "--objective-options", json.dumps(options), "--held-out", 0]
    words += ["--max-length", LONGEST, "--on-bad-line", "skip"]
    minutes = 0.0
    if text == "online":
        words += ["--online", "--data", prompts, "--answer-tokens", a.answer_tokens, "--answer-tree", a.answer_tree]
        words += ["--answer-temperature", 0] if arm == "online greedy" else []
    else:
        features, files, minutes = answered(text, seed, prompts, a)
        words += ["--data", *files, "--features", features]
    words += ["--seed", seed, "--max-minutes", a.minutes - minutes, "--learning-rate", a.learning_rate]
    words += ["--set", "save_strategy=no", "report_to=none", f"draft_steps={a.draft_steps}"]
    with (folder / "log.txt").open("w") as log:
        subprocess.run([str(word) for word in words], check=True, stdout=log, stderr=subprocess.STDOUT)
    return folder


def measure(folder: Path, drafter: str | Path, part: str, read: Callable[[str, float], Read], a: Any) -> None:
    """Write `folder`/<part>-<decoding>-<temperature>.json: new tokens and passes of every prompt."""
    folder.mkdir(parents=True, exist_ok=True)
    for temperature in a.temperatures:
        for name in a.decodings:
            path = folder / f"{part}-{name}-{temperature:g}.json"
            if not path.exists():
                turns, replay = read(part, temperature)
                shape, verification, _ = DECODINGS[name]
                loaded = load_drafter(drafter, replay.target)
                found = per_prompt(turns, replay(loaded, shape_for(loaded, shape), verification, 0))
                path.write_text(json.dumps(np.array(found).T.tolist()))


def rows_of(runs: dict[str, list[Path]], a: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each part, decoding, temperature and arm."""
    rows = []
    for part in ("traffic", "general"):
        for name in a.decodings:
            for temperature in a.temperatures:
                file = f"{part}-{name}-{temperature:g}.json"
                base = counts(runs[CONTROL], file).T
                for arm, folders in runs.items():
                    mine = counts(folders, file).T
                    row = {"prompts": part, "decoding": name, "temperature": temperature, "arm": arm}
                    rows.append(row | {"tau": pooled_rate(*mine), "seeds": len(folders)} | ratio(mine, base))
    return rows


def show(rows: Sequence[dict[str, Any]], a: argparse.Namespace) -> None:
    title = f"{a.count} prompts of {a.traffic}, {a.minutes:g} minutes in all"
    table = Table("prompts", "decoding", "T", "arm", "τ", f"× {CONTROL}", title=title)
    for row in rows:
        table.add_row(
            row["prompts"],
            row["decoding"],
            f"{row['temperature']:g}",
            row["arm"],
            f"{row['tau']:.3f}",
            formatted_ratio(row),
        )
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", required=True, help="drafter that all arms start from")
    parser.add_argument("--prompts", required=True, help="prompts, each with its source")
    parser.add_argument("--traffic", required=True, help="source of the traffic")
    parser.add_argument("--count", type=int, default=100, help="prompts to adapt to")
    parser.add_argument("--limit", type=int, default=40, help="prompts to measure on, of the traffic and of others")
    parser.add_argument("--logs", help="recorded answers of people or of another model, for the arms on logs")
    parser.add_argument("--out", type=Path, default=Path("runs/adapt"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[arm for arm in ARMS if "logs" not in arm])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--decodings", nargs="+", choices=("tree", "chain"), default=["tree", "chain"])
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 1.0])
    parser.add_argument("--answer-tokens", type=int, default=256)
    parser.add_argument("--answer-tree", default="none", help="as of vsd train; none is fastest on a CPU")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="of the answers that τ is measured on")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--draft-steps", type=int, default=5)
    a = parser.parse_args()
    if CONTROL not in a.arms or (a.logs is None and any("logs" in arm for arm in a.arms)):
        parser.error(f"the control, {CONTROL}, must be among --arms, and arms on logs need --logs")
    check_settings(a, SETTINGS)
    keep_freed_memory()
    files = split_prompts(a)
    runs = {arm: [train(arm, seed, files["train"], a) for seed in a.seeds] for arm in a.arms}
    target = load_target()

    @cache
    def read(part: str, temperature: float) -> tuple[list[Turn], Any]:
        prompts: list[Prompt] = load_prompts([files[part]])
        path = a.out / f"{part}-answers-{temperature:g}.json"
        turns = plain_answers(target, prompts, a.max_new_tokens, path, temperature)
        return turns, replay_of(target, turns, temperature)

    for arm, folders in runs.items():
        for folder in folders:
            for part in ("traffic", "general"):
                measure(folder, a.start if arm == "start" else folder / "drafter", part, read, a)
    rows = rows_of(runs, a)
    show(rows, a)
    write_json({"rows": rows, "settings": {k: str(v) for k, v in vars(a).items()}}, a.out / "adapt.json")


if __name__ == "__main__":
    main()
