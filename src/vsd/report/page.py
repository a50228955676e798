"""The page: header, contents and sections; self-contained, without scripts, fonts or images."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from vsd import __version__
from vsd.errors import ConfigurationError
from vsd.report.entries import Measured
from vsd.report.html import Html, join, tag
from vsd.report.layout import Section
from vsd.report.measurement import acceptance, answers, slices, speed, summary, trees
from vsd.report.read import Bench, Training, read
from vsd.report.series import Series, numbered, short_names
from vsd.report.served import beside, served
from vsd.report.settings import commands, settings
from vsd.report.training import curves

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # a browser loads nothing for the page

_WHERE = ("settings.prompts", "machine.dtype", "machine.device")


def write_report(sources: Sequence[str | Path], out: str | Path) -> Path:
    """Write a page about run folders of `vsd train` and JSON files of `vsd bench`; returns its path.

    Raises:
        ConfigurationError: no sources.
        DataError: a source that is neither.
    """
    if not sources:
        raise ConfigurationError("nothing to report: give run folders of vsd train or JSON files of vsd bench")
    trainings, benches = read(sources)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(trainings, benches, out), encoding="utf-8")
    return out


def page(trainings: Sequence[Training], benches: Sequence[Bench], out: Path) -> Html:
    """The whole page."""
    trained, drafted, plain = _compared(trainings, benches)
    sections = [
        *speed(drafted, plain),
        *served(benches),
        *acceptance(drafted),
        *slices(drafted),
        *trees(benches),
        *curves(trained),
        *answers(drafted),
        *settings(trained, benches),
        *commands(trained, benches, out),
    ]
    named = [s.name for s, _ in (*trained, *drafted)] + [beside(b.served) for b in benches if b.served is not None]
    title = ", ".join(dict.fromkeys(named)) or "plain decoding"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", f"vsd report: {title}"),
        tag("style", Html(files("vsd.report").joinpath("style.css").read_text(encoding="utf-8"))),
    )
    header = tag(
        "header", tag("h1", title), tag("p", _about(trainings, benches)), *summary(drafted), _contents(sections)
    )
    footer = tag("footer", f"Written by vsd {__version__}. This page needs no network.")
    body = tag("body", header, tag("main", *(one.html for one in sections)), footer)
    return join([Html("<!doctype html>\n"), tag("html", head, body, lang="en")])


def _compared(
    trainings: Sequence[Training], benches: Sequence[Bench]
) -> tuple[list[tuple[Series, Training]], list[tuple[Series, Measured]], list[Measured]]:
    """Trainings and drafters with their series, and plain decoding; a drafter has the series of its training."""
    runs = [(bench, run) for bench in benches for run in bench.runs]
    drafted = [(bench, run) for bench, run in runs if run.drafter is not None]
    folders = [str(training.path.resolve()) for training in trainings]
    short = short_names(dict.fromkeys([*folders, *(run.drafter or "" for _, run in drafted)]))
    names = [short[folder] for folder in folders]
    paths = short_names(str(bench.path) for bench in benches)
    measured = _names([(short[run.drafter or ""], *_setting(run), paths[str(bench.path)]) for bench, run in drafted])
    series = numbered([*measured, *names])
    return (
        [(series[name], training) for name, training in zip(names, trainings)],
        [(series[name], run) for name, (_, run) in zip(measured, drafted)],
        [run for _, run in runs if run.drafter is None],
    )


def _setting(run: Measured) -> tuple[str, ...]:
    """What may tell measurements of a drafter apart."""
    return run.tree, run.verification, f"temperature {run.temperature:g}"


def _names(settings: Sequence[tuple[str, ...]]) -> list[str]:
    """The first setting, and those of the others that are not the same in all measurements."""
    differ = [n > 0 and len(set(values)) > 1 for n, values in enumerate(zip(*settings))]
    return [", ".join(v for n, v in enumerate(one) if n == 0 or differ[n]) for one in settings]


def _about(trainings: Sequence[Training], benches: Sequence[Bench]) -> str:
    """Targets, prompts and machines."""
    targets = [f"target: {training.recipe['target']}" for training in trainings if "target" in training.recipe]
    found = [[bench.settings.get(key) for key in _WHERE] for bench in benches if bench.runs or bench.served]
    where = [f"{count} prompts, {dtype} on {device}" for count, dtype, device in found]
    return "; ".join(dict.fromkeys([*targets, *where]))


def _contents(sections: Sequence[Section]) -> Html:
    """Links to the sections."""
    return tag("nav", *(tag("a", one.title, href=f"#{one.name}") for one in sections), aria_label="contents")
