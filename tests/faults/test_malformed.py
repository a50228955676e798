"""Malformed inputs end as the convention says; `benchmarks/faults.py` tries many more of them."""

from pathlib import Path
from random import Random

import pytest

import bad_options
import case
import malformed
from case import Workshop

FOUND = [  # rules that once found a traceback, a silent loss or an unnamed mistake
    "line: the rendering's own arguments",
    "file: two\nlines",
    "recipe: not UTF-8",
    "recipe: a number as key",
    "recipe: itself",
    "recipe: too deep",
    "--set: range 0",
    "--set: range 2",
    "--set: range 8",
    "drafter option 2",
    "drafter option 5",
    "range: regenerate 0",
    "range: synthesize 1",
    "range: bench 1",
    "range: demo 1",
    "drafter: NaN or infinity",
    "drafter: absolute d2t",
    "drafter: absolute d2t without t2d",
    "drafter: a missing tensor",
    "target: truncated weights",
    "target: a missing tensor",
    "target: a tensor of another shape",
    "target: another tokenizer",
    "export: results 0",
    "store: a truncated shard",
    "store: a shard of another shape",
    "store: a manifest that is none",
    "server for ever: deep JSON",
    "server for ever: ids that are no integers",
    "server for ever: drops",
    "server for ever: not HTTP",
    "server for ever: more tokens than allowed",
    "server for ever: the prompt of another question",
]
NUMBERS = sorted({*map(list(malformed.RULES).index, FOUND), *range(0, len(malformed.RULES), 16)})


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return case.build(tmp_path_factory.mktemp("workshop"))


@pytest.mark.parametrize("number", NUMBERS, ids=malformed.rule_of)
def test_a_malformed_input_is_one_line_and_leaves_nothing_half(
    shop: Workshop, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VSD_CACHE", str(tmp_path / "cache"))
    assert not malformed.attempt(shop, tmp_path / "case", 0, number)


@pytest.mark.parametrize(
    ("option", "names"),
    [("drafter_options={no_such_field: 1}", "no field no_such_field"), ("output_dir=''", "output_dir is empty")],
)
def test_options_that_did_nothing_are_refused(shop: Workshop, tmp_path: Path, option: str, names: str) -> None:
    words = shop.train(tmp_path / "run", option)
    if "output" in option:
        del words[(place := words.index("--output-dir")) : place + 2]
    assert not case.complaint(case.Case(words, case.refused(names)), tmp_path)


@pytest.mark.parametrize("name", bad_options.IMPOSSIBLE)
def test_options_that_cannot_apply_are_refused_before_features_are_computed(
    shop: Workshop, tmp_path: Path, name: str
) -> None:
    assert not case.complaint(bad_options.impossible(name)(shop, tmp_path, Random(0)), tmp_path)


def test_a_rule_makes_the_same_case_of_the_same_seed(shop: Workshop, tmp_path: Path) -> None:
    rule = malformed.RULES["line: cut"]
    made = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        rule(shop, tmp_path / name, Random(f"{seed} 1"))
        made.append([path.read_bytes()[10:] for path in sorted((tmp_path / name).iterdir())])
    assert made[0] == made[1] != made[2]
