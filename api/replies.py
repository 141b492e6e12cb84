"""Answers in the forms that all endpoints share."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import orjson
from starlette.responses import Response

from wave_proxy.errors import WaveError

JSON = "application/json"

# No document has these outside of its texts: spelled in another way, it means nothing to who takes it for a page.
_MARKUP = ((b"<", b"\\u003c"), (b">", b"\\u003e"), (b"&", b"\\u0026"))
_MAX_REASON_CHARS = 500
_NO_SNIFFING = {"X-Content-Type-Options": "nosniff"}


def json_reply(document: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON document, without a character that could begin an element of HTML."""
    content = orjson.dumps(document)
    for character, spelled in _MARKUP:
        content = content.replace(character, spelled)
    return Response(content, status, {**_NO_SNIFFING, **(headers or {})}, JSON)


def repeated(seconds: float, *names: str) -> dict[str, str]:
    """The header by which the proxy in front, which takes it off, may give an answer to all who ask for the same.

    It does so for that long, as long as none of the tokens and jobs with these ``names`` ends or changes.
    """
    return {"X-Wave-Repeat": " ".join((f"{max(seconds, 0.0):.3f}", *names))}


def reason_of(error: WaveError) -> dict[str, str]:
    """The header by which the proxy in front, which takes it off, logs why a request failed: a code, then a text."""
    return {"X-Wave-Reason": quote(f"{error.code} {error}"[:_MAX_REASON_CHARS], safe=" !\"'(),./:;=@[]{}")}


def framework_error(
    path: str, status: int, title: str, text: str, headers: Mapping[str, str] | None = None
) -> Response:
    """The form of errors that no endpoint is responsible for (``wave.md`` §0.3)."""
    document = {
        "_links": {"self": [{"href": path, "templated": False}]},
        "_embedded": {"errors": [{"message": text}]},
        "message": title,
    }
    return json_reply(document, status, headers)
