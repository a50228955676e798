"""All families of drafters in one table: trained equally long, then continued with each objective, then measured.

    python benchmarks/families.py --text TEXT … --prompts FILE … --out runs/families \\
        [--families eagle3 peagle dflash dspark] [--start-minutes 30] [--minutes 10] [--seeds 0 1] [--limit 24]

Every family is trained from random weights for --start-minutes with its own objective (cross-entropy with a decay,
which is `eagle3` for all of them), or is given by --starts FAMILY=FOLDER. benchmarks/study.py then continues each start
for --minutes with every objective of --objectives: the control is the family's own objective continued for as long.

Two tables: τ and its ratio to the control by family, objective and decoding; and, of every family's start, τ,
milliseconds to draft and tokens/s, one request at a time, families in alternation with plain decoding. All families
share the text's features where they read the same layers. An interrupted command can be repeated.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from study import VARIANTS, formatted_ratio
from vsd.allocator import keep_freed_memory
from vsd.drafters import load_drafter
from vsd.evaluation import Contender, bench, load_prompts, write_json
from vsd.paths import TreeShape
from vsd.targets import load_target

HERE = Path(__file__).parent


def start(family: str, a: argparse.Namespace) -> Path:
    """The folder of a family's start; trains it unless it exists."""
    if family in a.starts:
        return Path(a.starts[family])
    folder: Path = a.out / family / "start"
    if not (folder / "drafter" / "config.json").exists():
        words = ["vsd.cli", "train", "--family", family, "--data", *a.text, "--output-dir", folder, "--held-out", 48]
        words += ["--max-minutes", a.start_minutes, "--draft-steps", a.draft_steps, "--on-bad-line", "skip"]
        words += ["--ramp", a.ramp, "--set", "save_strategy=no", "report_to=none", "eval_steps=0.1"]
        words += [f"learning_rate={a.start_rate}", f"per_device_train_batch_size={a.batch_size}"]
        run("-m", words, folder / "log.txt")
    return folder / "drafter"


def study(family: str, drafter: Path, a: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of benchmarks/study.py from a start."""
    folder: Path = a.out / family / "study"
    words = [HERE / "study.py", "--text", *a.text, "--start", drafter, "--prompts", *a.prompts, "--out", folder]
    words += ["--minutes", a.minutes, "--seeds", *a.seeds, "--objectives", *a.objectives, "--limit", a.limit]
    words += ["--draft-steps", a.draft_steps, "--batch-size", a.batch_size, "--decodings", "tree", "chain", "rejection"]
    run("", words, a.out / family / "study.txt")
    rows: list[dict[str, Any]] = json.loads((folder / "study.json").read_text())["rows"]
    return rows


def run(module: str, words: list[Any], log: Path) -> None:
    """A Python command with its output in a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *([module] if module else []), *map(str, words)]
    with log.open("w") as file:
        subprocess.run(command, check=True, stdout=file, stderr=subprocess.STDOUT)


def speed(starts: dict[str, Path], a: argparse.Namespace) -> dict[str, Any]:
    """`vsd bench` of all starts with one chain and at T = 0."""
    path = a.out / "bench.json"
    if not path.exists():
        target = load_target()
        shape = TreeShape.chain(a.draft_steps)
        contenders = [Contender(family, load_drafter(folder, target), shape) for family, folder in starts.items()]
        write_json(bench(target, contenders, load_prompts(a.prompts, a.speed), max_new_tokens=128), path)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def show(rows: list[dict[str, Any]], timed: dict[str, Any]) -> None:
    table = Table("family", "objective", "decoding", "T", "τ", "× eagle3", title="continued from one start")
    for row in rows:
        temperature, tau = f"{row['temperature']:g}", f"{row['tau']:.3f}"
        table.add_row(row["family"], row["objective"], row["decoding"], temperature, tau, formatted_ratio(row))
    Console(width=130).print(table)
    table = Table("start", "τ", "draft ms", "verify ms", "tokens/s", "× plain", title="one request at a time")
    for found in timed["runs"]:
        low, high = found["speedup_ci"]
        parts = found["latency"]
        table.add_row(
            found["drafter"] or "plain",
            f"{found['tau']:.2f}",
            f"{parts['draft']:.1f}",
            f"{parts['verify']:.1f}",
            f"{found['tokens_per_second']:.1f}",
            f"{found['speedup']:.2f} [{low:.2f}, {high:.2f}]",
        )
    Console(width=130).print(table)


def pair(text: str) -> tuple[str, str]:
    """FAMILY=FOLDER."""
    family, equals, folder = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"FAMILY=FOLDER, not {text}")
    return family, folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", required=True, help="training text written by the target")
    parser.add_argument("--prompts", nargs="+", required=True, help="prompt files of the measurement")
    parser.add_argument("--out", type=Path, default=Path("runs/families"))
    parser.add_argument("--families", nargs="+", default=["eagle3", "peagle", "dflash", "dspark"])
    parser.add_argument("--starts", nargs="+", type=pair, default=[], help="trained starts, FAMILY=FOLDER")
    parser.add_argument("--start-minutes", type=float, default=30)
    parser.add_argument("--start-rate", type=float, default=2e-3)
    parser.add_argument("--ramp", type=float, default=0.5)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--objectives", nargs="+", choices=VARIANTS, default=["eagle3", "dpace", "lk_lambda", "vsd", "vsd with ARW"]
    )
    parser.add_argument("--draft-steps", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--limit", type=int, default=24, help="prompts of each file")
    parser.add_argument("--speed", type=int, default=4, help="prompts of each file to time")
    a = parser.parse_args()
    a.starts = dict(a.starts)
    keep_freed_memory()
    starts = {family: start(family, a) for family in a.families}
    rows = [{"family": family, **row} for family, folder in starts.items() for row in study(family, folder, a)]
    timed = speed(starts, a)
    show(rows, timed)
    write_json({"rows": rows, "bench": timed, "settings": {k: str(v) for k, v in vars(a).items()}}, a.out / "all.json")


if __name__ == "__main__":
    main()
