"""Links and commands of README and docs: every link and anchor resolves, every `vsd …` is one that the parser takes.

Pages that are made from the code (docs/site/pages.py) are included. Nothing is executed, and mkdocs is not needed.
"""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from vsd import cli
from vsd.cli.parser import Command, Parser
from vsd.objective import objective
from vsd.objective.table import OBJECTIVES, describe
from vsd.paths import TreeShape

ROOT = Path(__file__).parents[2]
FENCED = re.compile(r"^( *)```.*?^\1```", re.M | re.S)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
MADE_FROM = {"docs/changelog.md": "CHANGELOG.md"}  # pages of the site that are files of the repository
STARTS = re.compile(r"^(?:\$ )?(?:echo .* \| )?(?:torchrun .* --no-python )?(?=vsd )")


@cache
def made() -> Any:
    """The module that makes pages."""
    spec = importlib.util.spec_from_file_location("vsd_docs_pages", ROOT / "docs" / "site" / "pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def texts() -> dict[str, str]:
    """Markdown by path: README, docs, and made pages."""
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md"))]
    written = {str(path.relative_to(ROOT)): path.read_text() for path in files}
    return written | {f"docs/{name}": text for name, text in made().pages().items()}


def anchors(markdown: str) -> set[str]:
    """Anchors of headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", markdown), re.M)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


def broken(path: str, markdown: str) -> list[str]:
    """Links of a page that lead nowhere."""
    wrong = []
    for link in LINK.findall(re.sub(r"`[^`\n]*`", "", FENCED.sub("", markdown))):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        file = (ROOT / path).parent.joinpath(name).resolve() if name else ROOT / path
        found = str(file.relative_to(ROOT))
        found = MADE_FROM.get(found, found)
        known = found in texts() or file.exists()
        if not known or (anchor and anchor not in anchors(texts().get(found, ""))):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("path", sorted(texts()))
def test_links_resolve(path: str) -> None:
    assert broken(path, texts()[path]) == []


def test_a_broken_link_is_found() -> None:
    page = "[a](no.md) [b](results.md#no-such) [c](results.md#terms) [d](results.md) [e](../recipes/no.yaml)"
    assert broken("docs/index.md", page) == ["no.md", "results.md#no-such", "results.md#terms", "../recipes/no.yaml"]


def commands(markdown: str) -> Iterator[tuple[str, bool]]:
    """Commands of a page, each with whether it is whole: in a block of code, and without an ellipsis."""
    inside = [block[0] for block in re.finditer(r"(?:^ *```.*?^ *```|(?:^    .*\n)+)", markdown + "\n", re.M | re.S)]
    for block in inside:
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            if start := STARTS.match(line.strip()):
                command, *_ = re.split(r"\s{3,}", line.strip()[start.end() :])  # help explains examples behind spaces
                yield command, not any(mark in command for mark in ("…", "[OPTIONS]", "COMMAND"))
    for code in re.findall(r"`(vsd [^`]+)`", FENCED.sub("", markdown)):
        yield " ".join(code.split()), False


def words(command: str) -> list[str]:
    """Arguments of a command, without comments and what stands for any others."""
    return [word for word in shlex.split(command, comments=True)[1:] if word != "…"]


def refused(command: str, whole: bool) -> str | None:
    """Why the parser does not take a command; None if it does."""
    given = words(command)
    if not whole:
        return refused_parts(given)
    chosen, options = cli._parse(given)
    return refused_values(chosen, options.values)


def refused_parts(given: list[str]) -> str | None:
    """Of a command that leaves things out: a command or a flag that does not exist."""
    names, flags = [w for w in given if w.isalpha()], [w for w in given if w.startswith("--")]
    parser = Parser.of("vsd", cli.VSD)
    parsers = {"vsd": parser, **parser.add_commands(cli.VSD)}
    if not names or names[0].isupper():
        return None
    path = max((p for p in parsers if f"vsd {' '.join(names)} ".startswith(f"{p} ")), key=len)
    known = {option for action in parsers[path]._actions for option in action.option_strings}
    if path == "vsd":
        return f"no command {names[0]}"
    return next((f"{path} has no {flag}" for flag in flags if flag not in known), None)


def refused_values(chosen: Command, values: dict[str, Any]) -> str | None:
    """Values that the parser takes but the command would not: trees, objectives and their options, recipes."""
    if "tree" in values:
        TreeShape.parse(values["tree"])
    if "objective" in values or "objective_options" in values:
        objective(values.get("objective", "eagle3"), values.get("objective_options"))
    config = str(values.get("config") or "")
    return f"no {config}" if config.startswith("recipes/") and not (ROOT / config).exists() else None


FOUND = sorted({(command, whole) for text in texts().values() for command, whole in commands(text)})


@pytest.mark.parametrize(("command", "whole"), FOUND, ids=[command for command, _ in FOUND])
def test_commands_are_taken(command: str, whole: bool) -> None:
    assert refused(command, whole) is None


def test_there_are_commands_of_every_kind() -> None:
    """The search finds something: every command of vsd appears as a whole one in the guides."""
    whole = [command for command, is_whole in FOUND if is_whole]
    for start in ("data regenerate", "data check", "data synthesize", "train", "bench", "tune", "export", "import"):
        assert any(command.startswith(f"vsd {start} ") for command in whole), start
    assert len(whole) > 40


@pytest.mark.parametrize(
    "command",
    ["vsd train --no-such-option 1 --data x", "vsd bench --drafter x", "vsd train --data x --draft-steps many"],
)
def test_a_wrong_command_is_refused(command: str) -> None:
    with pytest.raises(SystemExit):
        refused(command, True)
    assert refused("vsd train … --no-such-option", False) == "vsd train has no --no-such-option"
    assert refused("vsd tran …", False) == "no command tran"


def test_made_pages_are_complete() -> None:
    """Every objective with its options, every command with its flags, every package."""
    page = made().pages()["reference/objectives.md"]
    for name in OBJECTIVES:
        described = describe(name)
        assert f"\n## {name}\n" in page and described.source in page
        assert all(f"| `{option.name}` |" in page for option in described.options)
    page = made().pages()["reference/commands.md"]
    parser = Parser.of("vsd", cli.VSD)
    for path, each in parser.add_commands(cli.VSD).items():
        assert f"\n## {path}\n" in page
        flags = [option for action in each._actions for option in action.option_strings if option.startswith("--")]
        assert all(f"`{flag}" in page for flag in flags if flag != "--help"), path


def test_every_package_has_a_page() -> None:
    """Of the Python API; the command line, the demo and the data of the package are not of it."""
    folders = {path.parent.name for path in ROOT.glob("src/vsd/*/__init__.py")}
    assert set(made().PACKAGES) == (folders | {"errors"}) - {"cli", "demo", "assets"}


def test_the_navigation_names_every_page() -> None:
    """mkdocs.yml lists each page, written or made, once."""
    listed = re.findall(r"([\w./-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    pages = {path.removeprefix("docs/") for path in texts() if path.startswith("docs/")}
    assert sorted(listed) == sorted(pages | {"changelog.md"})
