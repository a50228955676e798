"""The page: numbers of the files, text that stays text, nothing from a network, and no section without data."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from report_example import (
    ATTACK,
    explained,
    measured,
    side,
    together,
    tried_trees,
    write_bench,
    write_run,
    write_served,
)
from report_pages import Element, figure_of, parsed, rows_of, section
from vsd.errors import VSDError
from vsd.report import runs_of, write_report
from vsd.report.context import place


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trainings, and a measurement of their drafters with everything."""
    folder = tmp_path_factory.mktemp("report")
    runs = [write_run(folder / "runs" / "a"), write_run(folder / "runs" / "b", "vsd", lift=0.05)]
    drafters = {str(run / "drafter"): tau for run, tau in zip(runs, (1.9, 2.1))}
    bench = write_bench(folder / "bench.json", drafters, trees=tried_trees(), command="vsd bench --tree 4x3x12")
    return write_report([*runs, bench], folder / "new" / "report.html")


def test_a_browser_loads_nothing_and_runs_nothing(page: Path) -> None:
    text = page.read_text()
    document, every = parsed(text)
    assert not {one.name for one in every} & {"script", "img", "iframe", "object", "embed", "form", "base", "audio"}
    for one in every:
        assert not [name for name in one.attributes if name.startswith("on") or name in ("src", "srcset", "style")]
        assert one.attributes.get("href", "#").startswith(("#", "data:"))
    (style,) = document.all("style")
    assert "url(" not in style.text and "@import" not in style.text and "http" not in style.text
    assert "http" not in text.replace("http-equiv", "").replace("http://evil.example/x", "")
    assert any("default-src 'none'" in one.attributes.get("content", "") for one in document.all("meta"))


def test_answers_are_shown_as_they_are(page: Path) -> None:
    """Markup in prompts, answers and names is text; accepted pieces are marked."""
    answers = section(page, "Answers")
    assert answers is not None
    wanted = explained(2.0)["samples"]
    texts = answers.all("p", "text")
    assert [text.text for text in texts] == [
        "".join(piece for piece, _ in sample["pieces"]) for sample in wanted for _ in ("a", "b")
    ]
    accepted = [piece for piece, proposed in wanted[0]["pieces"] if proposed]
    assert [span.text for span in texts[0].all("span", "accepted")] == accepted
    assert [summary.text for summary in answers.all("summary")] == ["Why is the sky blue?", ATTACK]
    slices = section(page, "τ by slice")
    assert slices is not None and ATTACK in [cell.text for cell in slices.all("th")]


def test_the_table_of_runs_has_the_measured_numbers(page: Path) -> None:
    speed = section(page, "Speed")
    assert speed is not None
    cells = [[c.text for c in (*row.all("th"), *row.all("td"))] for row in speed.all("table", "wide")[0].all("tr")[1:]]
    assert cells == [
        ["plain decoding", "0", "–", "1", "30.0", "1", "100 %"],
        ["a", "0", "4x3x12", "1.90 [1.79, 2.03]", "39.9", "1.33 [1.28, 1.39]", "100 %"],
        ["b", "0", "4x3x12", "2.10 [1.99, 2.23]", "44.1", "1.47 [1.42, 1.53]", "100 %"],
    ]
    document, _ = parsed(page.read_text())
    tiles = [one.text for one in document.all("dl", "tiles")[0].all("dd")]
    assert tiles == ["2.101.99 to 2.23", "1.471.42 to 1.53", "44.1plain: 30.0", "100 %greedy"]
    assert document.all("p", "fastest")[0].text == "The fastest of 2: b"


def test_figures_carry_intervals_and_an_alternative(page: Path) -> None:
    document, _ = parsed(page.read_text())
    figures = {figure.all("h3")[0].text: figure for figure in document.all("figure")}
    assert set(figures) >= {"Speed-up", "Acceptance length", "Time of a pass", "By position", "By length of context"}
    assert set(figures) >= {"By file", "By category", "Expected speed", "Held-out τ", "Training loss"}
    assert "By thinking" not in figures  # a single value
    for figure in figures.values():
        (svg,) = figure.all("svg")
        assert svg.attributes["role"] == "img" and len(svg.attributes["aria-label"]) > 20
        assert figure.all("table") and svg.all("title")
    assert "a, 2 tokens or more: 0.35 [0.31, 0.39]" in [t.text for t in figures["By position"].all("title")]
    assert "b, context of 128–256 tokens: 2.10 [2.00, 2.20]" in [
        t.text for t in figures["By length of context"].all("title")
    ]
    assert "4x3x12 pays" in figures["Expected speed"].text
    for svg in document.all("svg"):
        assert svg.attributes.get("aria-label") or svg.attributes.get("aria-hidden") == "true"


def page_of(tmp_path: Path, *runs: dict[str, Any]) -> Element:
    (tmp_path / "x.json").write_text(json.dumps({"runs": runs}))
    return parsed(write_report([tmp_path / "x.json"], tmp_path / "x.html").read_text())[0]


def test_speed_by_concurrency_is_drawn_where_several_were_measured(page: Path, tmp_path: Path) -> None:
    """With plain decoding in the table of numbers; a drafter with a single concurrency is left out."""
    figure = figure_of(page, "By concurrency")
    assert "a, 16 at a time: 0.90 [0.86, 0.94]" in [title.text for title in figure.all("title")]
    numbers = rows_of(figure.all("table")[0])
    assert [row[:2] for row in numbers] == [[n, c] for n in ("plain decoding", "a", "b") for c in ("1", "4", "16")]
    assert numbers[4] == ["a", "4", "1.22 [1.18, 1.26]", "79.8", "1.90", "77.4"]
    assert numbers[2] == ["plain decoding", "16", "1", "120.0", "1", "155"]
    one = measured("a", 2.0, 1.5, by_concurrency=together(2.0, 1.5)[:1])
    assert figure_of(page_of(tmp_path, one), "By concurrency") is None
    several = measured("b", 2.0, 1.5, by_concurrency=together(2.0, 1.5)[::-1])
    figure = figure_of(page_of(tmp_path, one, several), "By concurrency")
    assert [row[:2] for row in rows_of(figure.all("table")[0])] == [["b", "1"], ["b", "4"], ["b", "16"]]


def contexts(**highs: float) -> dict[str, Any]:
    """τ 2 before 1024 tokens and 1.5 behind, with the upper ends of the intervals."""
    rows = [(256, 2.1), (512, 2.1), (1024, highs["first"]), (2048, highs["second"])]
    found = [
        {"from": n, "to": 2 * n, "tau": 2.0 if n < 1024 else 1.5, "tau_ci": [1.4, high], "passes": 50}
        for n, high in rows
    ]
    return {"by_context": found, "trained_length": 1024}


def test_contexts_beyond_the_trained_length_are_told(tmp_path: Path) -> None:
    """By more than chance: the interval ends below the τ within."""
    one = measured("a", 2.0, 1.5, **contexts(first=2.05, second=1.95))
    figure = figure_of(page_of(tmp_path, one), "By length of context")
    assert "Trained with texts of up to 1024 tokens." in figure.text
    assert "lower than within, by more than chance: a at 2048–4096." in figure.text
    assert figure.all("svg")[0].attributes["aria-label"].endswith("A line marks: trained: ≤ 1024 tokens.")
    level = measured("a", 2.0, 1.5, **contexts(first=2.05, second=2.05))
    assert "Beyond that, τ is not lower" in figure_of(page_of(tmp_path, level), "By length of context").text


def test_different_or_unknown_trained_lengths_are_no_line(tmp_path: Path) -> None:
    one = measured("a", 2.0, 1.5, **contexts(first=2.05, second=1.95))
    other = measured("b", 2.0, 1.5, **{**contexts(first=2.05, second=1.95), "trained_length": 2048})
    unknown = measured("c", 2.0, 1.5, **{**contexts(first=2.05, second=1.95), "trained_length": None})
    figure = figure_of(page_of(tmp_path, one, other, unknown), "By length of context")
    assert "at most so many tokens: a: 1024; b: 2048." in figure.text and "c at" not in figure.text
    assert "by more than chance: a at 2048–4096." in figure.text and "A line marks" not in str(figure)
    figure = figure_of(page_of(tmp_path, unknown), "By length of context")
    assert "not known here" in figure.text and "A line marks" not in str(figure)


@given(st.integers(1, 20000), st.lists(st.integers(4, 12), min_size=1, unique=True))
def test_the_trained_length_lies_between_the_ranges_within_and_beyond(trained: int, powers: list[int]) -> None:
    starts = [2**k for k in sorted(powers)]
    at = place(trained, starts)
    within = [n for n, start in enumerate(starts) if 2 * start <= trained]
    beyond = [n for n, start in enumerate(starts) if start >= trained]
    if at is None:
        assert len(beyond) == len(starts) or len(within) == len(starts)
    else:
        assert all(n + 0.5 <= at for n in within) and all(at <= n - 0.5 for n in beyond)


def test_a_served_engine_has_a_section(tmp_path: Path) -> None:
    """Acceptance and speed on both sides, where acceptance differs, and the answers that differ."""
    file = write_served(tmp_path / "served.json", side(0.6, 0.4, 0.2))
    path = write_report([file], tmp_path / "served.html")
    served = section(path, "A served engine")
    assert served is not None and "Acceptance differs from drafted token 2 on: -0.100 [-0.150, -0.050]" in served.text
    titles = [title.text for title in served.all("title")]
    assert (
        "vLLM, 2 tokens or more: 0.30 [0.26, 0.34]" in titles and "vsd, 3 tokens or more: 0.20 [0.16, 0.24]" in titles
    )
    engines, differing = served.all("table", "wide")
    assert rows_of(engines) == [
        ["vLLM", "500", "2.00 [1.90, 2.10]", "80.0"],
        ["vsd", "500", "2.20 [2.10, 2.30]", "88.0"],
    ]
    assert "58 of 60 answers (97 %) equal" in served.text
    assert rows_of(differing) == [
        [ATTACK, "1", "5", "17", "end", "0.0312"],
        ["7", "2", "1", "5", "99", "0, second best"],
    ]
    document, _ = parsed(path.read_text())
    assert document.all("h1")[0].text == "vLLM beside vsd" and "60 prompts, bfloat16 on x86_64" in document.text
    assert [one.text for one in document.all("h2")] == ["A served engine", "Settings", "Make it again"]
    assert "vsd bench --server http://localhost:8000 --model m" in document.all("pre")[0].text


def test_a_served_engine_without_a_drafter_here_and_many_differences(tmp_path: Path) -> None:
    files = [write_served(tmp_path / "a.json", None, 0), write_served(tmp_path / "b.json", side(0.6, 0.3, 0.1), 60)]
    path = write_report(files, tmp_path / "served.html")
    alone, many = section(path, "A served engine: a.json"), section(path, "A served engine: b.json")
    assert alone is not None and "60 of 60 answers (100 %)" in alone.text and "vsd" not in alone.text
    assert not alone.all("p", "fastest") and len(alone.all("table")) == 2 and "Acceptance differs" not in alone.text
    assert many is not None and "60 answers that differ" in many.text and "10 more are in the file" in many.text
    assert len(rows_of(many.all("table", "wide")[1])) == 50


def test_a_training_and_its_drafter_look_the_same(page: Path) -> None:
    """`b` has one colour where it is measured and where it is trained."""
    document, _ = parsed(page.read_text())
    classes: dict[str, set[str]] = {}
    for legend in document.all("ul", "legend"):
        for entry in legend.all("li"):
            classes.setdefault(entry.text, set()).add(entry.all("g")[0].attributes["class"])
    assert classes["a"] == {"s0"} and classes["b"] == {"s1"}


def test_curves_are_over_minutes_where_all_runs_have_them(page: Path, tmp_path: Path) -> None:
    training = section(page, "Training")
    assert training is not None and "τ by minutes of training. a: 1.32 at 2, 2 at 10" in str(training)
    mixed = [write_run(tmp_path / "a"), write_run(tmp_path / "b", minutes=False)]
    training = section(write_report(mixed, tmp_path / "r.html"), "Training")
    assert training is not None and "τ by steps. a: 1.32 at 12, 2 at 60" in str(training)


def test_settings_and_commands(page: Path) -> None:
    settings, again = section(page, "Settings"), section(page, "Make it again")
    assert settings is not None and again is not None
    rows = settings.all("table", "wide")[0].all("tr")[1:]
    assert [[cell.text for cell in (*row.all("th"), *row.all("td"))] for row in rows] == [
        ["objective", "eagle3", "vsd"]
    ]
    folded = settings.all("details")
    assert "objective_options.decay" in folded[0].text and "0.8" in folded[0].text
    assert "settings.prompts3" in folded[2].text and "machine.dtypebfloat16" in folded[2].text
    lines = again.all("pre")[0].text.splitlines()
    root = page.parent.parent
    assert lines == [
        f"vsd train --config {root}/runs/a/recipe.json --output-dir {root}/runs/a-again",
        f"vsd train --config {root}/runs/b/recipe.json --output-dir {root}/runs/b-again",
        "vsd bench --tree 4x3x12",
        f"vsd report {root}/runs/a {root}/runs/b {root}/bench.json --out {page}",
    ]


def test_an_old_file_has_only_the_sections_of_its_data(tmp_path: Path) -> None:
    bench = write_bench(tmp_path / "old.json", {"a": 1.9}, full=False)
    document, _ = parsed(write_report([bench], tmp_path / "old.html").read_text())
    assert [one.text for one in document.all("h2")] == [
        *("Speed", "Acceptance", "τ by slice", "Settings", "Make it again")
    ]
    assert [one.text for one in document.all("nav")[0].all("a")] == [one.text for one in document.all("h2")]
    assert "gsm8k, a: 2.20" in [one.text for one in document.all("title")]  # τ by file, without an interval


def test_measurements_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    runs = [measured("runs/a/drafter", 2.0, 1.5), measured("runs/a/drafter", 1.8, 1.2, temperature=1.0)]
    (tmp_path / "t.json").write_text(json.dumps({"runs": runs}))
    document, _ = parsed(write_report([tmp_path / "t.json"], tmp_path / "t.html").read_text())
    assert document.all("h1")[0].text == "a, temperature 0, a, temperature 1"


def test_the_same_files_give_the_same_page(page: Path, tmp_path: Path) -> None:
    root = page.parent.parent
    before = page.read_bytes()
    write_report([root / "runs" / "a", root / "runs" / "b", root / "bench.json"], page)
    assert page.read_bytes() == before


def test_a_training_that_logged_nothing_and_one_without_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "recipe.json").write_text('{"objective": "eagle3"}')
    assert section(write_report([tmp_path / "a"], tmp_path / "a.html"), "Training") is None
    run = write_run(tmp_path / "b")
    (run / "recipe.json").unlink()
    assert section(write_report([run], tmp_path / "b.html"), "Settings") is None
    assert runs_of([tmp_path / "a" / "drafter", run / "drafter"]) == [tmp_path / "a"]


def test_an_unfinished_run_is_read_from_its_last_whole_checkpoint(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    state = (run / "trainer_state.json").rename(tmp_path / "state.json").read_text()
    for step, text in ((8, '{"log_history": []}'), (60, state), (100, state[:-9])):
        (run / f"checkpoint-{step}").mkdir()
        (run / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    training = section(write_report([run], tmp_path / "a.html"), "Training")
    assert training is not None and "2 at 10" in str(training)


def test_values_that_are_not_numbers_are_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    state = json.loads((run / "trainer_state.json").read_text())
    state["log_history"][0]["loss"] = float("nan")
    (run / "trainer_state.json").write_text(json.dumps(state))
    empty = {"tau": None, "tau_ci": None, "answers": 1, "tokens": 1}
    slices = {"file": {"x": empty, "y": {**empty, "tau": 2.0}, "z": {**empty, "tau": 1.5, "tau_ci": [None, None]}}}
    (tmp_path / "b.json").write_text(json.dumps({"runs": [measured("a", 2.0, 1.5, slices=slices)]}))
    text = write_report([run, tmp_path / "b.json"], tmp_path / "r.html").read_text()
    assert "nan" not in text.lower().replace("dominant", "") and "y, a: 2.00" in text and "x, a" not in text


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "neither 'runs' nor 'trees'"),
        ('{"runs": [{"drafter": "a"}]}', "no JSON file of vsd bench or vsd tune: KeyError"),
        ('{"runs": 3}', "no JSON file of vsd bench or vsd tune"),
        ('{"runs": [3]}', "no JSON file of vsd bench or vsd tune"),
        ('{"trees": [{"shape": {"depth": 0}, "tau": 1, "seconds": 1, "speedup": 1}]}', "depth ≥ 1"),
        (json.dumps({"runs": [measured("a", float("nan"), 1.0)]}), "nan is no measurement"),
        ('{"runs": [], "server": 7}', "no JSON file of vsd bench or vsd tune"),
        ('{"runs": [], "server": {"engine": "vLLM", "here": null}}', "no JSON file of vsd bench or vsd tune"),
        ('{"runs": [], "server": {"here": null, "depth": 3, "answers": 0}}', "nothing was drafted or answered"),
    ],
)
def test_a_file_of_something_else_is_one_line(tmp_path: Path, content: str, what: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(VSDError, match=what) as caught:
        write_report([tmp_path / "x.json"], tmp_path / "r.html")
    assert "\n" not in str(caught.value) and "x.json" in str(caught.value)
    assert not (tmp_path / "r.html").exists()


def test_control_characters_and_lone_surrogates_do_not_break_the_page(tmp_path: Path) -> None:
    sample = {"prompt": "p\x00\ud800", "pieces": [["a\x1b[31m\udfff\tb\n", True]]}
    (tmp_path / "x.json").write_text(json.dumps({"runs": [measured("a", 2.0, 1.5, samples=[sample])]}))
    answers = section(write_report([tmp_path / "x.json"], tmp_path / "r.html"), "Answers")
    assert answers is not None and answers.all("p", "text")[0].text == "a\ufffd[31m?\tb\n"
