"""From facts to HTML: the templates, and what goes with every page."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from starlette.responses import HTMLResponse

from api.pages.assets import asset
from api.pages.formats import ABSENT, format_time, readable

# Nothing but our own style sheets and scripts; none that stand in a page, as a value that got through would.
_POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-store", "Referrer-Policy": "same-origin"}


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing that a page tells: ``lines`` of text, the only one a link with ``href``."""

    label: str
    lines: tuple[str, ...]
    href: str = ""


def fact(label: str, value: object, href: str = "") -> Fact:
    """A fact: of a time, a yes or no, a text, a number, or several of them; of nothing, which is told as well."""
    match value:
        case datetime():
            lines: tuple[str, ...] = (format_time(value),)
        case bool():
            lines = ("yes" if value else "no",)
        case list() | tuple():
            lines = tuple(str(item) for item in value)
        case None | "":
            lines = ()
        case _:
            lines = (str(value),)
    return Fact(label, lines or (ABSENT,), href if lines else "")


def given(*facts: Fact) -> list[Fact]:
    """Those of the facts that tell something."""
    return [one for one in facts if one.lines != (ABSENT,)]


def page(template: str, title: str, facts: Iterable[Fact] = (), *, status: int = 200, **more: Any) -> HTMLResponse:
    """The page that a template makes of a title, facts and more; every value is escaped."""
    text = _environment.get_template(template).render(title=title, facts=list(facts), **more)
    return HTMLResponse(text, status, _HEADERS)


def message(title: str, text: str, status: int = 200, *, hint: str = "") -> HTMLResponse:
    """A page that says one thing, and in ``hint`` what to make of it: text that marks code with backticks."""
    return page("message.html", title, text=text, hint=hint, status=status)


def _marked(text: str) -> Markup:
    """Paragraphs of a text that marks code with backticks."""
    return Markup("").join(Markup("<p>{}</p>").format(_inline(part)) for part in text.split("\n\n") if part.strip())


def _inline(text: str) -> Markup:
    parts = enumerate(text.split("`"))
    return Markup("").join(Markup("<code>{}</code>").format(part) if at % 2 else escape(part) for at, part in parts)


_environment = Environment(
    loader=PackageLoader("api.pages"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_environment.globals["asset"] = asset
_environment.filters |= {"readable": readable, "marked": _marked}
