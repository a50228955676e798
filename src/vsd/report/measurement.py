"""What `vsd bench` and `vsd tune` measured: speed, acceptance, slices, context, trees, answers."""

from collections.abc import Sequence

from vsd.evaluation.tune import best
from vsd.report.charts import Bar, Line, Point, Row, bars, plane, rows
from vsd.report.concurrency import by_concurrency
from vsd.report.context import by_context
from vsd.report.entries import Estimate, Measured, Sample, Slice
from vsd.report.html import Html, folded, join, table, tag
from vsd.report.layout import Section, figure, figures, numbers_of_lines, numbers_of_rows, section
from vsd.report.position import INTERVALS, by_position
from vsd.report.read import Bench
from vsd.report.scale import brief
from vsd.report.series import Series, legend

Runs = Sequence[tuple[Series, Measured]]

_VALUES = 16  # values of a field that are drawn
_ANSWERS = 6  # prompts whose answers are shown
_PROMPT = 100  # characters of a folded prompt
_TAU = "τ is new tokens per target pass, bonus token included, pooled over all passes after prefill."


def summary(runs: Runs) -> list[Html]:
    """The numbers of the fastest drafter."""
    if not runs:
        return []
    series, run = max(runs, key=lambda pair: pair[1].speedup.value)
    tiles = [
        ("acceptance length τ", f"{run.tau.value:.2f}", _interval(run.tau)),
        ("× plain decoding", f"{run.speedup.value:.2f}", _interval(run.speedup)),
        ("tokens/s", f"{run.tokens_per_second:.1f}", f"plain: {run.tokens_per_second / run.speedup.value:.1f}"),
    ]
    if run.identical is not None:
        tiles.append(("answers equal to plain decoding's", f"{100 * run.identical:.0f} %", "greedy"))
    drawn = [tag("div", tag("dt", what), tag("dd", value, tag("small", note))) for what, value, note in tiles]
    which = (
        [tag("p", f"The fastest of {len(runs)}: ", tag("b", series.name), class_="fastest")] if len(runs) > 1 else []
    )
    return [*which, tag("dl", *drawn, class_="tiles")]


def speed(runs: Runs, plain: Sequence[Measured]) -> list[Section]:
    """Table of all runs; speed-up, and the time of a pass."""
    if not (runs or plain):
        return []
    cells = [(*_decoder("plain decoding", run), *_speeds(run)) for run in plain]
    cells += [(*_decoder(series.name, run), *_speeds(run)) for series, run in runs]
    head = ["run", "temperature", "tree", "τ", "tokens/s", "× plain decoding", "answers equal to plain"]
    return [
        section(
            "runs",
            "Speed",
            f"{_TAU} {INTERVALS}",
            table(head, cells, class_="wide"),
            legend(series for series, _ in runs),
            figures(*_speed_figures(runs, plain), *by_concurrency(runs, plain)) if runs else "",
        )
    ]


def acceptance(runs: Runs) -> list[Section]:
    """Acceptance by position and τ by length of context."""
    shares = [(series, run.acceptance) for series, run in runs if run.acceptance]
    found = [by_position(shares, "By position")] if shares else []
    found += by_context(runs)
    shown = legend(series for series, _ in shares)
    known = any(estimate.low is not None for _, estimates in shares for estimate in estimates)
    intro = f"How many drafted tokens the target accepts. {INTERVALS if known else ''}"
    return [section("acceptance", "Acceptance", intro, shown, figures(*found))] if found else []


def slices(runs: Runs) -> list[Section]:
    """τ by every field of the prompts that has several values."""
    fields = list(dict.fromkeys(field for _, run in runs for field in run.slices))
    found = [figure for field in fields for figure in _slice(runs, field)]
    intro = f"τ of parts of the prompts. {INTERVALS}"
    shown = legend(series for series, run in runs if run.slices)
    return [section("slices", "τ by slice", intro, shown, figures(*found))] if found else []


def trees(benches: Sequence[Bench]) -> list[Section]:
    """The trees that were tried, by number of nodes, and the one that pays."""
    found = [_trees(bench) for bench in benches if bench.trees]
    intro = "A larger tree accepts more tokens a pass, and a pass takes longer. Speeds are predictions for one request."
    return [section("trees", "The tree that pays", intro, *found)] if found else []


def answers(runs: Runs) -> list[Section]:
    """Answers with accepted tokens coloured, prompt by prompt."""
    prompts: dict[str, list[Html]] = {}
    for series, run in runs:
        for sample in run.samples:
            prompts.setdefault(sample.prompt, []).append(_answer(series, sample))
    key = tag("span", "Underlined on colour", class_="accepted")
    intro = join([key, ": proposed by the drafter and accepted. All other text is the target's own next token."])
    shown = [
        folded(
            _start(prompt), tag("p", prompt) if _start(prompt) != prompt else "", *texts, class_="answer", open=n < 1
        )
        for n, (prompt, texts) in enumerate(list(prompts.items())[:_ANSWERS])
    ]
    return [section("answers", "Answers", intro, *shown)] if shown else []


def _interval(estimate: Estimate) -> str:
    return "" if estimate.low is None else f"{estimate.low:.2f} to {estimate.high:.2f}"


def _decoder(name: str, run: Measured) -> tuple[str, str, str]:
    return name, f"{run.temperature:g}", run.tree or "–"


def _speeds(run: Measured) -> tuple[object, ...]:
    drafted = run.drafter is not None
    same = "–" if run.identical is None else f"{100 * run.identical:.0f} %"
    rate = f"{run.tokens_per_second:.1f}"
    return run.tau if drafted else "1", rate, run.speedup if drafted else "1", same


def _speed_figures(runs: Runs, plain: Sequence[Measured]) -> list[Html]:
    faster = [Row(s.name, [(s, run.speedup)]) for s, run in runs]
    longer = [Row(s.name, [(s, run.tau)]) for s, run in runs]
    named = [("plain decoding", run) for run in plain] + [(s.name, run) for s, run in runs]
    times = [Bar(name, run.latency) for name, run in named]
    parts = [(bar.label, *map(brief, bar.parts.values())) for bar in times]
    work = ("draft", "verify", "commit")
    key = join([join([tag("span", "", class_=f"swatch p{n}"), name, " "]) for n, name in enumerate(work)])
    title = "× plain decoding"
    return [
        figure("Speed-up", "Tokens a second, as a multiple of plain decoding.", rows(faster, title, level=(1, "plain")),
               numbers_of_rows(faster, "run", title)),
        figure("Acceptance length", "New tokens per target pass.", rows(longer, "τ", level=(1, "plain")),
               numbers_of_rows(longer, "run", "τ")),
        figure("Time of a pass", key, bars(times, "milliseconds a pass"),
               table(["run", *work], parts)),
    ]  # fmt: skip


def _slice(runs: Runs, field: str) -> list[Html]:
    """The figure of one field; none if it has a single value."""
    values: dict[str, list[tuple[Series, Slice]]] = {}
    for series, run in runs:
        for one in run.slices.get(field, []):
            values.setdefault(one.name, []).append((series, one))
    if len(values) < 2:
        return []
    most = sorted(values, key=lambda name: -sum(one.answers or 0 for _, one in values[name]))[:_VALUES]
    shown = [Row(name, [(s, one.tau) for s, one in marks]) for name, marks in values.items() if name in most]
    every = [Row(name, [(s, one.tau) for s, one in marks]) for name, marks in values.items()]
    note = f"The {_VALUES} values with most answers." if len(values) > _VALUES else ""
    return [figure(f"By {field}", note, rows(shown, "τ"), numbers_of_rows(every, field, "τ"))]


def _trees(bench: Bench) -> Html:
    series = (Series("trees tried", 0), Series("the tree that pays", 1))
    chosen = best(bench.trees).shape
    lines = [
        Line(one, [
            Point(tree.shape.largest, Estimate(tree.speedup), f"{tree.shape}, τ {tree.tau:.2f}")
            for tree in bench.trees
            if (tree.shape == chosen) == (one is series[1])
        ])
        for one in series
    ]  # fmt: skip
    lines = [line for line in lines if line.points]
    fastest = sorted(bench.trees, key=lambda tree: -tree.speedup)
    cells = [(t.shape, t.shape.largest, f"{t.tau:.2f}", f"{1e3 * t.seconds:.1f}", f"{t.speedup:.2f}") for t in fastest]
    drawn = plane(lines, "nodes verified in a pass", "expected × plain", joined=False, level=1.0)
    note = f"{chosen} pays: {chosen.depth} tokens ahead, a beam of {chosen.top_k}, {chosen.nodes} nodes in a pass."
    found = figure("Expected speed", note, drawn, numbers_of_lines(lines, "nodes", "expected × plain"))
    shown = table(["tree", "nodes", "τ", "ms a step", "expected × plain"], cells[:8], class_="wide")
    return tag("div", legend(line.series for line in lines), figures(found, tag("div", shown)))


def _answer(series: Series, sample: Sample) -> Html:
    pieces = [tag("span", piece, class_="accepted") if accepted else piece for piece, accepted in sample.pieces]
    return tag("div", tag("h3", series.name), tag("p", *pieces, class_="text"))


def _start(prompt: str) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= _PROMPT else f"{line[:_PROMPT]}…"
