"""The fault campaign: malformed inputs made by rule, and commands killed at random moments, on tiny random models.

    python benchmarks/faults.py --out runs/faults.jsonl --json runs/faults.json

A malformed input (`tests/faults/malformed.py`) must end with the exit status of the convention and one line that names
the mistake, without a traceback, with nothing half written and no line lost. A killed command (`tests/faults/kills.py`)
that is run again must end with the very files of a run that was not killed. Finished cases are stored in --out; an
interrupted command can be repeated. It fails if anything is wrong.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tiny models are fastest on one thread
TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "faults")]
os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:2], os.environ.get("PYTHONPATH", "")])  # of killed commands

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

import kills  # noqa: E402
import malformed  # noqa: E402
from case import Workshop, build  # noqa: E402
from vsd.evaluation import write_json  # noqa: E402
from vsd.progress import track  # noqa: E402

Record = dict[str, Any]  # of one case: kind, number, group, and what is wrong


def inputs(shop: Workshop, folder: Path, seed: int, numbers: list[int]) -> Iterator[Record]:
    """Malformed inputs."""
    for number in track(numbers, "malformed inputs"):
        wrong = malformed.attempt(shop, folder / str(number), seed, number)
        shutil.rmtree(folder / str(number), ignore_errors=True)
        yield {"kind": "input", "number": number, "group": malformed.rule_of(number), "wrong": wrong}


def killed(shop: Workshop, folder: Path, seed: int, command: str, numbers: list[int]) -> Iterator[Record]:
    """Trials of one command, each killed once or several times."""
    cost = kills.straight(shop, command, folder / command / "straight") if numbers else (0.0, 0)
    for number in track(numbers, f"kills of {command}"):
        out, reference = folder / command / str(number), folder / command / "straight"
        found = kills.trial(shop, command, reference, cost, out, Random(f"{seed} {command} {number}"))
        yield {"kind": "kill", "number": number, "group": command, "kills": found.met, "wrong": found.wrong}


def missing(records: list[Record], kind: str, count: int, group: str | None = None) -> list[int]:
    """Numbers of the cases that have no record yet."""
    done = {r["number"] for r in records if r["kind"] == kind and group in (None, r["group"])}
    return [number for number in range(count) if number not in done]


def measure(a: argparse.Namespace, shop: Workshop, work: Path) -> list[Record]:
    """All records; those in --out are not made again."""
    a.out.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in a.out.read_text().splitlines()] if a.out.exists() else []
    request = {"seed": a.seed, "rules": len(malformed.RULES)}
    if lines and lines[0] != request:
        sys.exit(f"{a.out} holds a campaign with other rules or another seed: give another --out, or delete the file")
    records = lines[1:]
    runs = [inputs(shop, work / "inputs", a.seed, missing(records, "input", a.inputs))]
    runs += [killed(shop, work, a.seed, c, missing(records, "kill", a.kills, c)) for c in kills.COMMANDS]
    with a.out.open("a") as file:
        for record in [request] if not lines else []:
            file.write(json.dumps(record) + "\n")
        for run in runs:
            for record in run:
                file.write(json.dumps(record) + "\n")
                file.flush()
                records.append(record)
    return records


def report(records: list[Record]) -> dict[str, dict[str, Any]]:
    """For each group: cases, kills that met the command, and what is wrong. Rules are grouped by their first word."""
    rows: dict[str, dict[str, Any]] = {}
    for record in records:
        kill = record["kind"] == "kill"
        name = f"killed {record['group']}" if kill else record["group"].partition(":")[0].rstrip(" 0123456789")
        row = rows.setdefault(name, {"cases": 0, "kills": 0, "wrong": []})
        row["cases"] += 1
        row["kills"] += record.get("kills", 0)
        row["wrong"] += [f"{record['number']} {record['group']}: {record['wrong']}"] if record["wrong"] else []
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=500, help="malformed inputs")
    parser.add_argument("--kills", type=int, default=100, help="trials of every killed command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="JSONL file; resumed if it exists")
    parser.add_argument("--json", type=Path, help="file for the counts")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "workshop"
        root.mkdir()
        records = measure(a, build(root), Path(folder))
    rows = report(records)
    total = Counter({key: sum(len(r[key]) if key == "wrong" else r[key] for r in rows.values()) for key in COLUMNS})
    if a.json:
        write_json({"seed": a.seed, "total": dict(total), "groups": rows}, a.json)
    table = Table("group", *COLUMNS, title="faults")
    for name, row in [*sorted(rows.items()), ("all", {**total, "wrong": [""] * total["wrong"]})]:
        table.add_row(name, str(row["cases"]), str(row["kills"]), str(len(row["wrong"])))
    Console().print(table)
    for wrong in (line for row in rows.values() for line in row["wrong"]):
        print(wrong, file=sys.stderr)
    sys.exit(1 if total["wrong"] else 0)


COLUMNS = ("cases", "kills", "wrong")

if __name__ == "__main__":
    main()
