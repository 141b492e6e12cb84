"""Pages as browsers read them."""

from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise

from tests.servers import Response

POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
_VOID = {"meta", "link", "input", "br", "img"}


@dataclass
class Page(HTMLParser):
    """A page: its elements with their attributes, and its text."""

    source: str
    elements: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    text: str = ""
    links: dict[str, str] = field(default_factory=dict)
    _open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.source)
        self.close()
        assert self._open == [], f"elements without an end: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        assert len(found) == len(attrs), f"an attribute comes twice: {attrs}"
        self.elements.append((tag, found))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> ends something else"

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open and self._open[-1] == "a":
            href = next(attributes["href"] for name, attributes in reversed(self.elements) if name == "a")
            self.links[data.strip()] = href

    def facts(self) -> dict[str, str]:
        """What the page lists, by its labels."""
        words = [line.strip() for line in self.text.splitlines() if line.strip()]
        return dict(pairwise(words))


def read_page(answer: Response) -> Page:
    """The page of an answer. Raises AssertionError for one that could run what is not ours, or reach another host."""
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert answer.headers["Content-Security-Policy"] == POLICY
    assert answer.headers["Cache-Control"] == "no-store"
    page = Page(answer.body.decode())
    for tag, attributes in page.elements:
        assert tag not in ("style", "iframe", "object", "embed", "base", "svg")
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
        if attributes.get("rel") == "noreferrer noopener":
            assert tag == "a"
            assert attributes["href"].startswith(("http://", "https://"))
            continue
        for name in ("src", "href", "action"):
            address = attributes.get(name, "/")
            assert address.startswith(("/", "#")), (tag, attributes)
            assert not address.startswith("//"), (tag, attributes)
        if tag == "script":
            assert attributes["src"].startswith("/assets/")
    return page
