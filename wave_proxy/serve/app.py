"""The port's handler: ``/v2/`` to the pull path, everything else to the api, and errors in the shape of each."""

from dataclasses import replace
from errno import EMFILE, ENFILE
from logging import INFO, WARNING
from re import compile as compile_pattern
from time import monotonic
from typing import Literal
from urllib.parse import unquote

import orjson
import structlog

from wave_proxy.errors import (
    Denied,
    HostUnknown,
    MethodNotAllowed,
    Overloaded,
    RangeInvalid,
    RequestInvalid,
    TooManyRequests,
    Unauthorized,
    UploadOutOfOrder,
    WaveError,
    clip,
)
from wave_proxy.serve.forward import Forwarder
from wave_proxy.serve.login import CHALLENGE
from wave_proxy.serve.messages import API_VERSION, NO_SNIFFING, Reply, Request
from wave_proxy.serve.pull import Puller
from wave_proxy.serve.push import received_range
from wave_proxy.serve.route import is_registry_path, kind_of
from wave_proxy.serve.stats import RequestStats

_log = structlog.get_logger()

_TOKEN = compile_pattern(r"\b([0-9a-f]{4})[0-9a-f]{28}\b")
# A user and password before a host, as people type them; behind the `@` of a tag there is a digest.
_LOGIN = compile_pattern(r"""(?<=//)[^\s'"@]+@|[^\s'"/@]+:[^\s'"/@]+@(?!sha\d)""")

LogRequests = Literal["all", "failed", "none"]


class App:
    """One worker's answers to whatever comes in."""

    def __init__(self, puller: Puller, forwarder: Forwarder, stats: RequestStats, log_requests: LogRequests) -> None:
        self._puller = puller
        self._forwarder = forwarder
        self._stats = stats
        self._log_requests = log_requests

    async def __call__(self, request: Request) -> Reply:
        """The reply to a request; never raises but for cancellation and lost connections."""
        began, error = monotonic(), None
        registry = is_registry_path(request.target)
        try:
            if not request.target.startswith("/") or "#" in request.target:
                # Some stop reading at a "#", and what decides where a path leads must not be one of those that do not.
                target = clip(request.target)
                raise RequestInvalid(f"the request's target {target} is not a path that begins with /, and without #")
            reply = await (self._puller.answer(request) if registry else self._forwarder.answer(request))
        except WaveError as err:
            error, reply = err, replace(_error_reply(err, registry), reason=f"{err.code} {err}")
        except (ConnectionError, TimeoutError):
            raise
        except Exception as err:
            if getattr(err, "errno", None) in (EMFILE, ENFILE):
                _log.error("out of file descriptors: raise the limit (ulimit -n)")
                return _error_reply(Overloaded("the server has too many open files; try again"), registry)
            _log.exception("request failed", method=request.method, target=redact(request.target))
            reply = _error_reply(WaveError("internal error: the server's log says more"), registry)
        self._count(request, reply, monotonic() - began)
        self._log_request(request, reply, error, began)
        if self._log_requests == "all":
            reply.terms = None  # the next one gets a line as well
        return reply

    def _count(self, request: Request, reply: Reply, seconds: float) -> None:
        state = next((value.lower() for name, value in reply.headers if name == "X-Cache"), "none")
        self._stats.count(kind_of(request.target), state, reply.status, seconds)
        if request.method != "HEAD":
            self._stats.bytes += reply.content_length() or 0

    def _log_request(self, request: Request, reply: Reply, error: WaveError | None, began: float) -> None:
        # What the operator can mend counts as failed, whatever its status says to the client.
        failed = reply.status >= 500 or reply.status == Denied.status or isinstance(error, HostUnknown)
        if self._log_requests == "all" or (self._log_requests == "failed" and failed):
            code, _, text = reply.reason.partition(" ")
            reason = {"code": code, "reason": _LOGIN.sub("…@", _TOKEN.sub(r"\1…", text))} if code else {}
            _log.log(
                WARNING if failed else INFO,
                "request",
                method=request.method,
                target=redact(request.target),
                status=reply.status,
                bytes=reply.content_length(),
                client=request.client,
                ms=round((monotonic() - began) * 1000, 1),
                **reason,
            )


def redact(target: str) -> str:
    """A request's path for the log: decoded, and without what it may hold of a token beyond its first four digits."""
    parts = unquote(target.partition("?")[0], errors="replace").split("/")
    if "pairing" in parts[:2]:
        parts = parts[:3]  # what follows is a licence
    shown = "/".join(f"{part[:4]}…" if _may_be_token(part) else part for part in parts)[:300]
    return "".join(char if char.isprintable() else "?" for char in shown)


def _may_be_token(part: str) -> bool:
    return len(part) in range(12, 64) and all(c in "0123456789abcdef" for c in part)


def _error_reply(err: WaveError, registry: bool) -> Reply:
    if registry:
        content = orjson.dumps({"errors": [{"code": err.code, "message": str(err)}]})
        headers = [("Content-Type", "application/json"), NO_SNIFFING, API_VERSION]
    else:
        # Spelled so that nothing in it could begin an element of HTML.
        content = orjson.dumps({"message": str(err)}).replace(b"<", b"\\u003c")
        headers = [("Content-Type", "application/json"), NO_SNIFFING]
    if err.retry_after_s is not None:
        headers.append(("Retry-After", str(err.retry_after_s)))
    if isinstance(err, TooManyRequests) and err.limit is not None:
        headers.append(("RateLimit-Limit", str(err.limit)))
        headers.append(("RateLimit-Remaining", str(err.remaining or 0)))
        headers.append(("RateLimit-Reset", str(err.reset_s or 0)))
    if isinstance(err, RangeInvalid):
        headers.append(("Content-Range", f"bytes */{err.size}"))
    if isinstance(err, UploadOutOfOrder):
        headers.append(received_range(err.received))
    if isinstance(err, Unauthorized):
        headers.append(CHALLENGE)
    if isinstance(err, MethodNotAllowed):
        headers.append(("Allow", err.allow))
    return Reply(err.status, headers, content)
