"""HTML and SVG by construction: markup is `Html`, every other value is text and is escaped."""

import re
from collections.abc import Iterable, Sequence
from html import escape

_VOID = {"meta", "link", "br"}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Html(str):
    """Markup, which is not escaped again."""


def text(value: object) -> Html:
    """A value as text; control characters and lone surrogates, which no page may hold, become replacement marks."""
    if isinstance(value, Html):
        return value
    valid = str(value).encode("utf-8", "replace").decode()
    return Html(escape(_CONTROL.sub("\ufffd", valid)))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element; attributes that are None or False are left out. `class_` is class, `aria_label` is aria-label."""
    words = [name]
    for key, value in attributes.items():
        if value is not None and value is not False:
            shown = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else text(value)
            words.append(f'{key.rstrip("_").replace("_", "-")}="{shown}"')
    start = f"<{' '.join(words)}>"
    return Html(start if name in _VOID else f"{start}{join(children)}</{name}>")


def join(parts: Iterable[object]) -> Html:
    """Parts one after another."""
    return Html("".join(text(part) for part in parts))


def table(head: Sequence[str], rows: Iterable[Sequence[object]], class_: str | None = None) -> Html:
    """A table; a row's first cell is its heading. Cells carry their column's name, for narrow screens."""
    body = [
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", c, data_label=h) for h, c in zip(head[1:], row[1:])))
        for row in rows
    ]
    columns = [tag("th", name, scope="col") for name in head]
    return tag("table", tag("thead", tag("tr", *columns)), tag("tbody", *body), class_=class_)


def folded(summary: object, *content: object, class_: str | None = None, open: bool = False) -> Html:
    """Content that a click on the summary shows."""
    return tag("details", tag("summary", summary), *content, class_=class_, open=open)
