"""A page as its elements, read by Python's own parser of HTML."""

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "link", "br"}


@dataclass
class Element:
    """An element with its attributes and content."""

    name: str
    attributes: dict[str, str]
    content: list["Element | str"] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(part if isinstance(part, str) else part.text for part in self.content)

    def all(self, name: str, class_: str | None = None) -> list["Element"]:
        """Elements of a name and a class inside this one, in order."""
        inner = [part for part in self.content if isinstance(part, Element)]
        found: list[Element] = []
        for one in inner:
            if one.name == name and (class_ is None or class_ in one.attributes.get("class", "").split()):
                found.append(one)
            found += one.all(name, class_)
        return found


class Parser(HTMLParser):
    """Fails where an element is not closed by its own end."""

    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("document", {})]
        self.every: list[Element] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        assert len(element.attributes) == len(attrs), f"<{tag}> has an attribute twice"
        self.open[-1].content.append(element)
        self.every.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().name == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].content.append(data)


def parsed(html: str) -> tuple[Element, list[Element]]:
    """(the document, all its elements)."""
    parser = Parser()
    parser.feed(html)
    parser.close()
    assert len(parser.open) == 1
    return parser.open[0], parser.every


def section(page: Path, title: str) -> Element | None:
    """The section of this title."""
    found = [one for one in parsed(page.read_text())[0].all("section") if one.all("h2")[0].text == title]
    return found[0] if found else None


def figure_of(page: Path | Element, title: str) -> Any:
    """The figure of this title; None if there is none."""
    document = page if isinstance(page, Element) else parsed(page.read_text())[0]
    return next((one for one in document.all("figure") if one.all("h3")[0].text == title), None)


def rows_of(table: Element) -> list[list[str]]:
    """The cells of a table, below its head."""
    return [[cell.text for cell in (*row.all("th"), *row.all("td"))] for row in table.all("tr")[1:]]
