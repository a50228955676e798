"""Commands that are killed at random moments and started again: they end with the very files of an unkilled run.

A moment is a time, or the n-th time that the command touches the file system (a file opened for writing, a rename, a
removal), so that the moments within a write, which are short, are met as well. A command is added to `COMMANDS`.
"""

import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import warm
from case import Workshop

_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")


class Killed(NamedTuple):
    """One trial: kills that met the command while it ran, kills planned, and what is wrong, or nothing."""

    met: int
    planned: int
    wrong: str


def train(shop: Workshop, out: Path) -> list[str]:
    """Training on recorded text."""
    return _training(shop, out, "--data", str(shop / "text.jsonl"), "--draft-vocab-size", "64")


def online(shop: Workshop, out: Path) -> list[str]:
    """Training on answers that are sampled during the training, four prompts a round, with a buffer of two rounds."""
    words = ["--online", "--data", str(_asked(shop)), "--drafter", str(shop / "drafter"), "--temperature", "1"]
    return _training(shop, out, *words, "--answer-tokens", "8", "--round-prompts", "4", "--buffer", "8")


def _training(shop: Workshop, out: Path, *words: str) -> list[str]:
    """Twelve steps, a checkpoint every two, τ every six."""
    chosen = ["train", *shop.named, *words, "--output-dir", str(out), "--held-out", "2", "--resume", "--set"]
    chosen += ["max_steps=12", "save_steps=2", "eval_steps=6", "logging_steps=2", "eval_max_new_tokens=4"]
    chosen += ["draft_steps=2", "per_device_train_batch_size=4", "bf16=no", "use_cpu=true"]
    return [*chosen, "report_to=none", "disable_tqdm=true"]


def regenerate(shop: Workshop, out: Path) -> list[str]:
    """Sampled answers to turns of conversations, four at a time."""
    words = ["data", "regenerate", str(_asked(shop)), "--out", str(out / "text.jsonl"), *shop.named]
    return [*words, "--max-new-tokens", "8", "--batch-size", "4", "--temperature", "1"]


def _asked(shop: Workshop) -> Path:
    """A file of 24 conversations of one to three turns, without answers."""
    path = shop.root / "asked.jsonl"
    if not path.exists():
        turns = [[f"question {i}.{t}" for t in range(i % 3 + 1)] for i in range(24)]
        path.write_text("".join(json.dumps({"turns": each}) + "\n" for each in turns))
    return path


def synthesize(shop: Workshop, out: Path) -> list[str]:
    """Twenty conversations of sixteen tries at a time."""
    words = ["data", "synthesize", "--out", str(out / "text.jsonl"), *shop.named, "--conversations", "20"]
    return [*words, "--max-new-tokens", "8", "--batch-size", "16", "--temperature", "1"]


COMMANDS = {"train": train, "online": online, "regenerate": regenerate, "synthesize": synthesize}


def straight(shop: Workshop, command: str, out: Path) -> tuple[float, int]:
    """An unkilled run; its seconds, and how often it touches the file system."""
    out.mkdir(parents=True)
    counted = out.with_name(f"{out.name}.count")
    _start(["--version"], out).join()  # the process that others are forked from is ready
    start = time.monotonic()
    process = _start(COMMANDS[command](shop, out), out, count=counted)
    process.join()
    assert process.exitcode == 0, f"{command} fails: {(out.parent / f'{out.name}.log').read_text()}"
    return time.monotonic() - start, int(counted.read_text())


def trial(shop: Workshop, command: str, reference: Path, cost: tuple[float, int], out: Path, random: Random) -> Killed:
    """Kill a run once, twice or thrice, then let it end; its files against those of the unkilled run."""
    out.mkdir(parents=True)
    (seconds, touches), met, planned = cost, 0, random.randint(1, 3)
    for attempt in range(planned):
        at = random.randint(1, touches) if attempt % 2 == 0 else None
        process = _start(COMMANDS[command](shop, out), out, kill_at=at)
        process.join(None if at else random.uniform(0, seconds))
        if process.is_alive():
            process.kill()
            process.join()
        met += process.exitcode == -signal.SIGKILL
        if process.exitcode not in (0, -signal.SIGKILL):
            return Killed(met, planned, f"status {process.exitcode}: {_log(out)}")
    process = _start(COMMANDS[command](shop, out), out)
    process.join()
    wrong = f"status {process.exitcode}: {_log(out)}" if process.exitcode else difference(reference, out)
    if not wrong:
        shutil.rmtree(out)
    return Killed(met, planned, wrong)


def difference(reference: Path, out: Path) -> str:
    """The first file that is not that of the unkilled run; nothing if there is none."""
    mine, theirs = _files(out), _files(reference)
    if mine != theirs:
        return f"left {sorted(mine - theirs)}, lacks {sorted(theirs - mine)}"
    for name in sorted(theirs):
        if _content(out / name) != _content(reference / name):
            return f"{name} differs"
    return ""


def _files(folder: Path) -> set[str]:
    """Files by name, without earlier checkpoints and features: which are left depends on the moment of the kill."""
    last = max((int(p.name.rpartition("-")[2]) for p in folder.glob("checkpoint-*")), default=0)
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    kept = re.compile(f"checkpoint-(?!{last}/)|online/.*safetensors$")  # an earlier checkpoint needs its features
    return {name for name in names if not kept.match(name)}


def _content(path: Path) -> Any:
    """What must be equal: all of a file but paths and pickles; of a log all but the entry of a run's own end."""
    if path.name in ("recipe.json", "training_args.bin", "rng_state.pth", "report.html"):
        return None
    if path.name == "trainer_state.json":
        return [entry for entry in json.loads(path.read_text())["log_history"] if "train_runtime" not in entry]
    return path.read_bytes()


def _log(out: Path) -> str:
    return out.with_name(f"{out.name}.log").read_text()[-500:]


def _start(words: list[str], out: Path, *, kill_at: int | None = None, count: Path | None = None) -> Any:
    """The command in a process of its own."""
    return warm.start(_run, words, kill_at, count, log=out.with_name(f"{out.name}.log"))


def _run(words: list[str], kill_at: int | None, count: Path | None) -> None:
    """The command, killed at the n-th touch of the file system, or counting them."""
    from vsd import cli

    touches = 0

    def touched(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal touches
        if event in _EVENTS or (event == "open" and isinstance(arguments[2], int) and arguments[2] & 3):
            touches += 1
            if touches == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(touched)
    code = cli.main(words)
    sys.stdout.flush()
    if count is not None:
        count.write_text(str(touches))
    os._exit(code)
