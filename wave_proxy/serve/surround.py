"""What surrounds every answer of the port: security headers, closed paths, no crawlers (``wave.md`` §0.5)."""

from collections.abc import Collection, Mapping
from re import IGNORECASE
from re import compile as compile_pattern
from urllib.parse import unquote

from wave_proxy.serve.http import Handler
from wave_proxy.serve.messages import Reply, Request

_CRAWLERS = compile_pattern(
    "googlebot|bingbot|yandexbot|baiduspider|duckduckbot|slurp|facebot|twitterbot|mj12bot|ahrefsbot", IGNORECASE
)
_RULES = "/robots.txt"


class Surround:
    """A handler around another one. ``headers`` go with every answer that does not bring its own by the same names.

    The paths ``denied`` are closed: exactly these, however they are encoded and whatever their query is.
    """

    def __init__(self, handler: Handler, headers: Mapping[str, str], denied: Collection[str] = ()) -> None:
        self._handler = handler
        self._headers = [(name.lower(), (name, value)) for name, value in headers.items()]
        self._denied = frozenset(denied)

    async def __call__(self, request: Request) -> Reply:
        """The reply of the handler; 405 to whom nothing is answered."""
        path = unquote(request.target.partition("?")[0], errors="replace")
        is_refused = path in self._denied or (path != _RULES and _is_crawler(request))
        reply = Reply(405) if is_refused else await self._handler(request)
        there = {name.lower() for name, _ in reply.headers}
        reply.headers = [*reply.headers, *(header for name, header in self._headers if name not in there)]
        return reply


def _is_crawler(request: Request) -> bool:
    return _CRAWLERS.search(request.header(b"user-agent") or "") is not None
