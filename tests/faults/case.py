"""A command with a malformed input: what is run, what must happen, and the complaint if something else does.

The convention: exit status 1 and one line on stderr that names the mistake and the remedy (2 for a mistake in flags),
no traceback, nothing written half, and no line lost without a report.
"""

import contextlib
import io
import json
import re
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

import tiny
import tiny_run
from vsd import cli
from vsd.drafters.load import new_drafter
from vsd.export import export_drafter
from vsd.targets import Target
from vsd.training import DraftDataset

SECONDS = 60  # for one command
_REPORT = re.compile(
    "; trying again$|: not a |: a folder in a folder$|^vsd: skipped "
)  # lines that may stand before the last one
_DECIDED = ("drafter=", "family=lm", "family=dflash2")  # drafters whose vocabulary is not chosen
OPTIONS = ["max_steps=1", "use_cpu=true", "report_to=none", "disable_tqdm=true", "save_strategy=no", "draft_steps=2"]


class Workshop(NamedTuple):
    """A folder with target/, text.jsonl (24 conversations), prompts.jsonl and drafters, and the target itself."""

    root: Path
    target: Target

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    @property
    def named(self) -> list[str]:
        """The flags of the target."""
        return ["--target", str(self.root / "target"), "--dtype", "float32", "--device", "cpu"]

    def train(self, out: Path, *more: object, data: Path | None = None) -> list[str]:
        """`vsd train` of one step."""
        words = ["train", *self.named, "--data", str(data or self / "text.jsonl"), "--output-dir", str(out)]
        options = [*map(str, more)]
        size = [] if any(option.startswith(_DECIDED) for option in options) else ["--draft-vocab-size", "64"]
        return [*words, "--held-out", "0", *size, "--set", *OPTIONS, *options]


class Outcome(NamedTuple):
    """Exit status, output and the traceback of an exception that `main` lets through."""

    code: int | None
    out: str
    err: str
    raised: str


class Case(NamedTuple):
    """A command, what its outcome must be, and what surrounds it.

    Attributes:
        words: the command line.
        wrong: the complaint about an outcome; empty if it is as it must be.
        around: a context in which the command runs, such as a server.
    """

    words: list[str]
    wrong: Callable[[Outcome], str]
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


Rule = Callable[[Workshop, Path, Random], Case]


def build(root: Path) -> Workshop:
    """A new workshop in an empty folder."""
    target = tiny.tiny_target()
    tiny_run.write_target(target, root / "target")
    tiny_run.write_text(target, root / "text.jsonl", 24)
    rows = [{"turns": ["hi there", "and then"]}, {"prompt": "why is that"}, {"prompt": "who"}]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = tiny_run.tiny_examples(target, 24)
    tiny_run.tiny_drafter(target, examples).save_pretrained(root / "drafter")
    tiny_run.tiny_drafter(target, examples, family="lm").save_pretrained(root / "lm")
    vocabulary = DraftDataset(examples).draft_vocabulary(target.vocab_size, 64)
    for family, kind in {"eagle3": "sglang", "peagle": "vllm", "dflash": "vllm", "dspark": "vllm"}.items():
        layers = {"aux_layers": [1, 2, 3]}
        export_drafter(new_drafter(target, vocabulary, family, **layers), target, root / family, kind)
    return Workshop(root, target)


def complaint(case: Case, folder: Path) -> str:
    """Run a case whose command writes below `folder`; what is wrong, or nothing."""
    before = set(folder.rglob("*"))
    outcome = run(case)
    if outcome.raised:
        return f"traceback: {outcome.raised}"
    return case.wrong(outcome) or next(half_written(set(folder.rglob("*")) - before), "")


def run(case: Case) -> Outcome:
    """The command in this process."""
    out, err, code, raised = io.StringIO(), io.StringIO(), None, ""
    with case.around(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with _limited():
                code = cli.main(case.words)
        except SystemExit as left:
            code = left.code  # type: ignore[assignment]
        except BaseException:
            raised = traceback.format_exc(limit=-3)
    return Outcome(code, out.getvalue(), err.getvalue(), raised)


def refused(names: str, code: int = 1) -> Callable[[Outcome], str]:
    """The demand for one line that matches a regular expression."""

    def wrong(found: Outcome) -> str:
        written = found.err.splitlines()
        lines = [*(line for line in written[:-1] if not _REPORT.search(line)), *written[-1:]]
        if found.code != code:
            return f"status {found.code}, not {code}: {found.err or found.out[-300:]}"
        if len(lines) != 1 or not lines[0].startswith("vsd: ") or len(lines[0]) > 1500:
            return f"not one line: {found.err}"
        return "" if re.search(names, lines[0]) else f"does not name {names}: {lines[0]}"

    return wrong


def half_written(paths: set[Path]) -> Iterator[str]:
    """Files that a command has left torn, and folders of drafters that it should not have begun."""
    for path in sorted(paths):
        if path.suffix in (".part", ".tmp"):
            yield f"left behind: {path}"
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            if path.suffix == ".jsonl" and path.is_file():
                [json.loads(line) for line in path.read_text().splitlines()]
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
        except (ValueError, SafetensorError) as error:
            yield f"half written: {path}: {error}"


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """An error for a command that does not end."""

    def late(*_: object) -> None:
        raise TimeoutError(f"no end after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
