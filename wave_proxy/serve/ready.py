"""Ready-made replies: a warm manifest or a small blob is one look-up, one quota decision and one write.

A reply is kept under its method and target, which decide it: of the headers only Range could change it, and no request
that has one is answered from here. It is found there, or sooner by the whole of an equal request's bytes: clients of
one kind send the same ones, and then nothing has to be parsed.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from time import monotonic, time

from wave_proxy.serve.messages import Reply, Request, Terms, format_head
from wave_proxy.serve.stats import Histogram, RequestStats
from wave_proxy.state.quota import Quotas, Subject, subject_of
from wave_proxy.state.usage import Cell, Usage

_REPLIES_BYTES = 32 << 20
_REQUESTS_BYTES = 8 << 20
_OVERHEAD_BYTES = 1000  # of a reply or a remembered request, beside its own bytes
_DATE_S = 1.0  # so old a Date and an Age may be
_CHANGES = frozenset({b"range", b"if-range"})


@dataclass(slots=True, eq=False)
class _Ready:
    """A reply as it is kept; what it counts is counted in the cells of its kind."""

    terms: Terms
    reply: Reply  # its head: with the state of a warm answer, and without an Age that grows
    body: bytes
    length: int | None
    size: int  # in memory
    until: float
    subject: Subject | None
    cell: Cell | None
    seconds: Histogram
    wires: "dict[bool, Wire]" = field(default_factory=dict)

    def end(self) -> None:
        """Never answer again. Remembered requests may still lead here, and must not keep the content alive."""
        self.until = 0.0
        self.body = b""
        for wire in self.wires.values():
            wire.content = b""
        self.wires.clear()


@dataclass(slots=True, eq=False)
class Wire:
    """What goes over the wire, and whether the connection ends with it. The bytes are renewed once a second."""

    ready: _Ready
    close: bool
    content: bytes = b""
    renew_at: float = 0.0


class ReadyReplies:
    """The ready-made replies of one worker."""

    def __init__(
        self, quotas: Quotas, usage: Usage, stats: RequestStats, changes: Callable[[], int] = lambda: 0
    ) -> None:
        """``changes`` says whether anything has changed in local repositories."""
        self._changes = changes
        self._quotas = quotas
        self._usage = usage
        self._stats = stats
        self._replies: OrderedDict[tuple[str, str], _Ready] = OrderedDict()  # oldest first
        self._bytes = 0
        self._by_name: defaultdict[str, set[tuple[str, str]]] = defaultdict(set)
        self._requests: dict[bytes, Wire] = {}
        self._requests_bytes = 0
        self.endings = 0  # of tokens, and changes of jobs: see keep()

    def answer_bytes(self, data: bytes, client: str) -> Wire | None:
        """The answer to what a client has sent, if it is one whole request that was answered before."""
        wire = self._requests.get(data)
        return wire if wire is not None and self._admits(wire, client) else None

    def answer(self, request: Request) -> Wire | None:
        """The answer to a request without a body; None when it takes more than a look-up, or a wait."""
        ready = self._replies.get((request.method, request.target))
        if ready is None or request.http_1_0 or any(name in _CHANGES for name, _ in request.headers):
            return None
        close = not request.keep_alive
        wire = ready.wires.get(close) or ready.wires.setdefault(close, Wire(ready, close))
        return wire if self._admits(wire, request.client) else None

    def remember(self, data: bytes, wire: Wire) -> None:
        """``data`` is a whole request, and always gets that answer."""
        if data not in self._requests:
            self._requests_bytes += len(data) + _OVERHEAD_BYTES
            if self._requests_bytes > _REQUESTS_BYTES:  # they come again
                self._requests.clear()
                self._requests_bytes = len(data) + _OVERHEAD_BYTES
        self._requests[data] = wire

    def keep(self, request: Request, reply: Reply, endings: int) -> None:
        """Keep a reply that says on which terms it may be given again.

        ``endings`` is what that counter said before the request's token was looked up: the token of a request that
        took longer may have ended meanwhile, and a job have changed.
        """
        terms = reply.terms
        if terms is None or request.body.received or not isinstance(reply.body, bytes):
            return
        if terms.names and endings != self.endings:
            return
        key = request.method, request.target
        self._drop(key)
        ready = self._replies[key] = self._make(request, reply, terms)
        self._bytes += ready.size
        for name in terms.names:
            self._by_name[name].add(key)
        while self._bytes > _REPLIES_BYTES:
            self._drop(next(iter(self._replies)))

    def forget(self, name: str) -> None:
        """Drop what was kept for a token, which has ended, or a job, which has changed."""
        self.endings += 1
        for key in list(self._by_name.get(name, ())):
            self._drop(key)

    def clear(self) -> None:
        """Drop everything, as tokens may have ended and jobs have changed."""
        self.endings += 1
        for key in list(self._replies):
            self._drop(key)

    def _make(self, request: Request, reply: Reply, terms: Terms) -> _Ready:
        subject = subject_of("pull", terms.email, "") if terms.email else None
        changing = {"X-Cache"} if terms.confirmed is None else {"X-Cache", "Age"}
        headers = [(name, value) for name, value in reply.headers if name not in changing]
        body = reply.body if request.method != "HEAD" and isinstance(reply.body, bytes) else b""
        return _Ready(
            terms,
            replace(reply, headers=[*headers, ("X-Cache", terms.state.upper())], body=b""),
            body,
            reply.content_length(),
            3 * len(body) + len(request.target) + 2 * _OVERHEAD_BYTES,  # itself and two wires
            terms.until,
            subject,
            self._usage.cell(terms.email, terms.fusion, terms.architecture) if terms.is_pull else None,
            self._stats.first_byte[terms.kind, terms.state, reply.status],
        )

    def _drop(self, key: tuple[str, str]) -> None:
        ready = self._replies.pop(key, None)
        if ready is None:
            return
        ready.end()
        self._bytes -= ready.size
        for name in ready.terms.names:
            keys = self._by_name[name]
            keys.discard(key)
            if not keys:
                del self._by_name[name]

    def _admits(self, wire: Wire, client: str) -> bool:
        """Whether the answer may be given now; it is counted then."""
        now, ready = monotonic(), wire.ready
        if now >= ready.until or (ready.terms.changes is not None and ready.terms.changes != self._changes()):
            return False
        if ready.cell is not None:
            if not self._quotas.try_admit(ready.subject or subject_of("pull", None, client)):
                return False
            ready.cell.pulls += 1
        if now >= wire.renew_at:
            _renew(wire, now)
        ready.seconds.counts[0] += 1
        self._stats.bytes += len(ready.body)
        return True


def _renew(wire: Wire, now: float) -> None:
    ready, reply = wire.ready, wire.ready.reply
    if ready.terms.confirmed is not None:
        reply = replace(reply, headers=[*reply.headers, ("Age", str(age_s(ready.terms.confirmed, time())))])
    wire.content = format_head(reply, ready.length, chunked=False, close=wire.close, http_1_0=False) + ready.body
    wire.renew_at = now + _DATE_S


def age_s(confirmed: float, now: float) -> int:
    """Whole seconds since ``confirmed`` (both epoch seconds), for an Age header."""
    return max(int(now - confirmed), 0)
