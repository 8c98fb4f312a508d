"""HTML made of elements, so that a text can only get into a page escaped. Pure."""

from __future__ import annotations

from collections.abc import Container, Iterable
from html import escape
from typing import TypeAlias


class Html(str):
    """Text that is HTML already; any other string is taken for plain text, and escaped."""

    __slots__ = ()


Content: TypeAlias = "str | Iterable[Content] | None"

_EMPTY = {"meta", "br", "rect", "line", "polyline", "circle", "path", "col"}
"""Elements that are closed where they are opened."""


def tag(name: str, /, *content: Content, **attributes: object) -> Html:
    """An element.

    Args:
        name: of the element.
        content: what is in it; strings are escaped, None is nothing.
        attributes: `_` at the end of a name is dropped and others become `-`, so that every name can be written; one
            that is None is left out.
    """
    told = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _EMPTY and not content:
        return Html(f"<{name}{told}/>")
    return Html(f"<{name}{told}>{joined(content)}</{name}>")


def joined(content: Content) -> Html:
    """Several pieces of content as one."""
    if content is None:
        return Html("")
    if isinstance(content, Html):
        return content
    if isinstance(content, str):
        return Html(escape(content))
    return Html("".join(joined(part) for part in content))


def name_of(text: str) -> Html:
    """A name that somebody else chose, kept apart from the direction of the text around it."""
    return tag("bdi", text)


def table(
    caption: str,
    head: Iterable[Content],
    rows: Iterable[Iterable[Content]],
    foot: Iterable[Content] | None = None,
    texts: Container[int] = (),
) -> Html:
    """A table whose first column says what each row is of; the others hold numbers, but for those in `texts`."""
    columns = (tag("th", one, scope="col", class_="text" if at in texts else None) for at, one in enumerate(head))
    return tag(
        "div",
        tag(
            "table",
            tag("caption", caption),
            tag("thead", tag("tr", *columns)),
            tag("tbody", *(_row(row, texts) for row in rows)),
            None if foot is None else tag("tfoot", _row(foot, texts)),
        ),
        class_="scroll",
    )


def _row(cells: Iterable[Content], texts: Container[int]) -> Html:
    first, *rest = cells
    others = (tag("td", cell, class_="text" if at in texts else None) for at, cell in enumerate(rest, 1))
    return tag("tr", tag("th", first, scope="row"), *others)


def document(title: str, style: str, *body: Content) -> str:
    """A whole page, which needs nothing from elsewhere."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        # Nothing is loaded, and nothing could be run, whatever somebody managed to get into a name.
        tag("meta", http_equiv="Content-Security-Policy", content="default-src 'none'; style-src 'unsafe-inline'"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(style)),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', *body), lang='en')}\n"
