"""What an operator's commands do in the state of the running service, and how they show it."""

import re
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, time, timedelta
from pathlib import Path
from typing import Any

from wave_proxy.errors import RequestInvalid, StateUnavailable, clip
from wave_proxy.state.identities import AccessToken, AccessTokens
from wave_proxy.state.redis import check, connect, place_of
from wave_proxy.supervisor import runtime_place

_DURATION = re.compile(r"([0-9]{1,5})([hdw])")
_HOURS = {"h": 1, "d": 24, "w": 7 * 24}
_ID = re.compile(r"(?:wpt-)?([a-z2-7]{8})(?:-[a-z2-7]{32})?")
_HEADINGS = ("ID", "USER", "NOTE", "CREATED", "EXPIRES", "LAST USED", "STATE")


class CommandFailed(Exception):
    """Why a command could not do what it was asked to, in one line."""


@asynccontextmanager
async def access_tokens(redis_url: str, data: Path) -> AsyncIterator[AccessTokens]:
    """The access tokens of the service that runs with this Redis, or with the embedded one of this data folder.

    Raises CommandFailed where nothing runs.
    """
    url = redis_url or _embedded(data)
    client = connect(url)
    try:
        try:
            await check(client)
        except StateUnavailable as err:
            raise CommandFailed(f"the Redis at {place_of(client)} does not answer: {err.__cause__}") from None
        yield AccessTokens(client)
    finally:
        await client.aclose()


def _embedded(data: Path) -> str:
    socket = runtime_place(data) / "redis.sock"
    try:
        is_there = socket.exists()
    except PermissionError:
        raise CommandFailed(f"{socket.parent} can't be read: run this as the user that wave-proxy runs as") from None
    if not is_there:
        raise CommandFailed(
            f"no wave-proxy is running with the data folder {data.resolve()}: start it with `wave-proxy serve`, "
            "or say where it is with --data DIR or --redis URL"
        )
    return f"unix://{socket}"


def parse_expiry(text: str, now: datetime) -> float:
    """When a token ends (epoch seconds, 0 for never): ``30d`` from now, at the end of ``2026-12-31`` in UTC, ``never``.

    Raises RequestInvalid.
    """
    if text == "never":
        return 0.0
    try:
        if match := _DURATION.fullmatch(text):
            return (now + timedelta(hours=int(match[1]) * _HOURS[match[2]])).timestamp()
        day = datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC)
        return datetime.combine(day, time(23, 59, 59), UTC).timestamp()
    except (ValueError, OverflowError):
        raise RequestInvalid(
            f"expires: expected 12h, 30d, 8w, a date such as 2026-12-31, or never, got {clip(text)}"
        ) from None


async def choose(tokens: AccessTokens, ids: Sequence[str], email: str) -> list[AccessToken]:
    """The tokens with these ids (whole tokens will do), or all valid ones of a user. Raises CommandFailed."""
    known, now = await tokens.read_all(), datetime.now(UTC).timestamp()
    if not ids:
        found = [token for token in known if token.email == email.strip().lower() and token.state(now) == "valid"]
        if not found:
            raise CommandFailed(f"{clip(email)} has no access token that is valid")
        return found
    by_id = {token.id: token for token in known}
    wanted = [match[1] if (match := _ID.fullmatch(text)) else text for text in ids]
    if missing := [text for text in wanted if text not in by_id]:
        raise CommandFailed(f"there is no access token {clip(missing[0], 20)}: `wave-proxy token list` shows their ids")
    return [by_id[text] for text in dict.fromkeys(wanted)]


# --- showing ---------------------------------------------------------------------------------------------------------


def token_table(tokens: Collection[AccessToken], now: float) -> str:
    """A table of tokens for people; times in UTC, to the minute."""
    rows = [
        (
            token.id,
            plain(token.email),
            plain(token.note) or "-",
            show_time(token.created),
            show_time(token.expires),
            show_time(token.last_used),
            token.state(now),
        )
        for token in tokens
    ]
    return _aligned([_HEADINGS, *rows])


def token_json(token: AccessToken, now: float) -> dict[str, Any]:
    """A token for programs; times as ISO-8601 in UTC, None for never."""
    return {
        "id": token.id,
        "user": token.email,
        "userId": token.user_id,
        "note": token.note,
        "created": _instant(token.created),
        "expires": _instant(token.expires),
        "lastUsed": _instant(token.last_used),
        "revoked": _instant(token.revoked),
        "state": token.state(now),
    }


def show_time(time: float) -> str:
    """``2026-12-31 23:59`` in UTC, or ``never``."""
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M") if time else "never"


def _instant(time: float) -> str | None:
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if time else None


def plain(text: str) -> str:
    """Text that a terminal shows as it is, and obeys in nothing."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
