"""Calls to Platforms through whichever process has a session with them: owner of ``wave:platform:*``.

``wave:platform:calls:<endpoint>`` is a list of calls that wait for a session to take them, each with the inbox that its
reply goes to and a time after which nobody waits for it. ``wave:platform:inbox:<process>`` is a list of replies.
``wave:platform:sessions:<endpoint>`` is a sorted set of the processes that have a session, by when that ends.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from secrets import token_hex
from time import time
from typing import Any

import orjson
import structlog

from wave_proxy.errors import StateUnavailable
from wave_proxy.image.platform import PlatformCall, PlatformReply
from wave_proxy.state.redis import Redis, answered, translated

_log = structlog.get_logger()

CALL_S = 5.0
_ROUND_S = 4.0  # less than the client's own limit on an answer
_SESSION_S = 15.0  # of a process that is gone; some rounds, as the clocks of machines differ
_LATE_S = 10.0  # a call that is older is not sent any more
_KEPT_S = 60
_PAUSE_S = 0.5
_MAX_WAITING = 64  # calls that a session was given and has not sent

# KEYS: the calls and the sessions of an endpoint. ARGV: now, a call, for how many seconds it is kept. Returns 0 when
# no process has a session.
_CALL = """
redis.call('zremrangebyscore', KEYS[2], '-inf', ARGV[1])
if redis.call('zcard', KEYS[2]) == 0 then return 0 end
redis.call('lpush', KEYS[1], ARGV[2])
redis.call('expire', KEYS[1], ARGV[3])
return 1
"""

Send = Callable[[str], Awaitable[None]]
"""Sends one message over a session. Raises when the session is gone."""


class NoSession(ConnectionError):
    """No process has a session with that Platform."""


class Channel:
    """One process's part: the calls that it makes, and those that it takes to the sessions that it has."""

    def __init__(self, redis: Redis, *, call_s: float = CALL_S) -> None:
        self._redis = redis
        self._call_s = call_s
        self._inbox = f"wave:platform:inbox:{token_hex(8)}"
        self._pending: dict[str, asyncio.Future[PlatformReply]] = {}
        self._sessions: dict[str, list[Session]] = {}  # by endpoint
        self._told_at = 0.0

    async def call(self, endpoint: str, call: PlatformCall) -> PlatformReply:
        """The Platform's reply to a call. Raises NoSession, TimeoutError after 5 s, StateUnavailable."""
        name, place = token_hex(8), _place(endpoint)
        reply: asyncio.Future[PlatformReply] = asyncio.get_running_loop().create_future()
        self._pending[name] = reply
        waiting = orjson.dumps([self._inbox, time() + self._call_s + _LATE_S, _call_to_json(name, call)])
        try:
            async with answered():
                keys = _calls(place), _holders(place)
                taken = await self._redis.eval(_CALL, 2, *keys, str(time()), waiting, str(_KEPT_S))
            if not taken:
                raise NoSession(f"the Platform at {endpoint} has no connection to this server")
            async with asyncio.timeout(self._call_s):
                return await reply
        finally:
            del self._pending[name]

    @contextmanager
    def session(self, endpoint: str, send: Send) -> Iterator["Session"]:
        """Take calls for that endpoint, for as long as the session lasts; its ``run`` sends them."""
        session = Session(self, send)
        sessions = self._sessions.setdefault(_place(endpoint), [])
        sessions.append(session)
        try:
            yield session
        finally:
            sessions.remove(session)
            if not sessions and self._sessions.get(_place(endpoint)) is sessions:
                del self._sessions[_place(endpoint)]

    async def announce(self, endpoint: str) -> None:
        """Tell all processes that this one has a session; or that it has none any more. Raises StateUnavailable."""
        place = _place(endpoint)
        async with answered(), self._redis.pipeline(transaction=True) as pipe:
            if place in self._sessions:
                pipe.zadd(_holders(place), {self._inbox: time() + _SESSION_S})
                pipe.expire(_holders(place), _KEPT_S)
            else:
                pipe.zrem(_holders(place), self._inbox)
            pipe.lpush(self._inbox, b"null")  # wakes who waits for the calls of other endpoints
            pipe.expire(self._inbox, _KEPT_S)
            await pipe.execute()

    async def run(self) -> None:
        """Take what comes, without an end: replies to this process's calls, and calls for its sessions."""
        while True:
            try:
                await self._tell()
                await self._take()
                continue
            except StateUnavailable as err:
                _log.debug("calls to Platforms wait", error=str(err))
            except Exception:
                _log.exception("a message between processes is none")
            await asyncio.sleep(_PAUSE_S)

    async def _tell(self) -> None:
        """Say every few seconds that the sessions are still there."""
        if self._sessions and time() - self._told_at >= _ROUND_S:
            async with answered(), self._redis.pipeline(transaction=True) as pipe:
                for place in self._sessions:
                    pipe.zadd(_holders(place), {self._inbox: time() + _SESSION_S})
                    pipe.expire(_holders(place), _KEPT_S)
                await pipe.execute()
            self._told_at = time()

    async def _take(self) -> None:
        """Wait for one thing for a few seconds, and hand it to whom it is for."""
        ready = {
            _calls(place): place for place, sessions in self._sessions.items() if any(s.has_room for s in sessions)
        }
        with translated():
            found: Any = await self._redis.brpop([self._inbox, *ready], timeout=_ROUND_S)
        if found is None:
            return
        key, content = found[0].decode(), orjson.loads(found[1])
        if key == self._inbox:
            if content is not None:
                self._settle(*content)
        elif sessions := [s for s in self._sessions.get(ready[key], []) if s.has_room]:
            min(sessions, key=lambda session: session.waiting).put(*content)
        else:  # the session ended while this was taken: others may have one
            with translated():
                await self._redis.lpush(key, found[1])

    def _settle(self, name: str, status: int, body: str, headers: Mapping[str, list[str]]) -> None:
        reply = self._pending.get(name)
        if reply is not None and not reply.done():
            values = {key.lower(): tuple(map(str, value)) for key, value in headers.items()}
            reply.set_result(PlatformReply(status, body, values))

    async def pass_on(self, inbox: str, reply: list[Any]) -> None:
        """Send a reply to the process that waits for it. Raises StateUnavailable."""
        async with answered(), self._redis.pipeline(transaction=True) as pipe:
            pipe.lpush(inbox, orjson.dumps(reply))
            pipe.expire(inbox, _KEPT_S)
            await pipe.execute()


class Session:
    """The calls of one session: those that wait to be sent, and those whose reply is awaited."""

    def __init__(self, channel: Channel, send: Send) -> None:
        self._channel = channel
        self._send = send
        self._calls: asyncio.Queue[tuple[str, float, dict[str, Any]]] = asyncio.Queue(_MAX_WAITING)
        self._asked: dict[str, tuple[str, float]] = {}

    @property
    def waiting(self) -> int:
        """Calls that are not sent yet."""
        return self._calls.qsize()

    @property
    def has_room(self) -> bool:
        """Whether it takes another call."""
        return not self._calls.full()

    def put(self, inbox: str, until: float, message: dict[str, Any]) -> None:
        """Take a call."""
        self._calls.put_nowait((inbox, until, message))

    async def run(self) -> None:
        """Send the calls that come, without an end. Raises what ``send`` raises."""
        while True:
            inbox, until, message = await self._calls.get()
            now = time()
            if until < now:
                continue
            self._asked = {name: asked for name, asked in self._asked.items() if asked[1] > now}
            self._asked[message["msgId"]] = (inbox, until)
            await self._send(orjson.dumps(message).decode())

    async def answer(self, message: Mapping[str, Any]) -> None:
        """Pass a ``proxy-http-response`` on to who asked; any other is dropped. Raises StateUnavailable."""
        match message:
            case {"msgId": str(name), "status": int(status)} if name in self._asked:
                inbox, _ = self._asked.pop(name)
                body, headers = message.get("body"), message.get("headers")
                reply = [name, status, body if isinstance(body, str) else "", _lists(headers)]
                await self._channel.pass_on(inbox, reply)
            case _:
                _log.debug("a Platform answered what nobody waits for")


def _lists(headers: object) -> dict[str, list[str]]:
    if not isinstance(headers, dict):
        return {}
    return {
        str(name): [*map(str, value)] if isinstance(value, list) else [str(value)] for name, value in headers.items()
    }


def _call_to_json(name: str, call: PlatformCall) -> dict[str, Any]:
    """The message. Source: ``wave.md`` §10.1."""
    return {
        "@type": "proxy-http-request",
        "msgId": name,
        "method": call.method,
        "uri": call.uri,
        "auth": call.authorization or None,
        "body": call.body or None,
        "headers": {key: [value] for key, value in call.headers.items()},
    }


def _place(endpoint: str) -> str:
    """Which queue serves an endpoint: the address without its scheme."""
    return endpoint.partition("://")[2]


def _calls(place: str) -> str:
    return f"wave:platform:calls:{place}"


def _holders(place: str) -> str:
    return f"wave:platform:sessions:{place}"
