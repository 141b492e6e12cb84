"""The body of an API request: read within a limit, decoded strictly."""

import json
from typing import Any

import orjson
from starlette.requests import Request

from api.callers import is_from_other_site
from wave_proxy.errors import BodyTooLarge, Denied, RequestInvalid, clip

# Small values take many times their own length in memory; a request has some hundred of them.
MAX_COMMAS = 200_000

# What browsers send for any page without asking first. Source: Fetch standard, "CORS-safelisted request-header".
_FORMS = frozenset({"", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"})


async def read_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """The JSON object that a request carries, whatever its content type.

    Raises Denied for one that a page of another site has made a browser send; BodyTooLarge, before anything was read
    where the length is announced; RequestInvalid.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type in _FORMS and is_from_other_site(request):
        raise Denied("A form on a page of another site can't be sent here")
    return decode_object(await _read(request, max_bytes))


async def read_text(request: Request, max_bytes: int) -> str:
    """The text that a request carries, in UTF-8. Raises BodyTooLarge, RequestInvalid."""
    try:
        return (await _read(request, max_bytes)).decode()
    except UnicodeDecodeError as err:
        raise RequestInvalid(f"The request body is not text in UTF-8: {err}") from None


async def _read(request: Request, max_bytes: int) -> bytearray:
    too_large = BodyTooLarge(f"The request body is over the limit of {max_bytes} bytes")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    return body


def decode_object(body: bytes | bytearray) -> dict[str, Any]:
    """Decode a JSON object. Raises RequestInvalid, also for keys that come twice: which one counts is a guess."""
    if not body.strip():
        raise RequestInvalid("The request body is empty: expected a JSON object")
    if body.count(b",") > MAX_COMMAS:
        raise RequestInvalid("The request body has too many values")
    try:
        document = orjson.loads(body)
        # orjson says nothing of keys that come twice; this pass keeps nothing of what it reads.
        json.loads(body, object_pairs_hook=_refuse_repeated_keys, parse_int=str, parse_float=str)
    except orjson.JSONDecodeError as err:
        raise RequestInvalid(f"The request body is not valid JSON: {err}") from None
    except RecursionError:
        raise RequestInvalid("The request body is not valid JSON: nested too deeply") from None
    if not isinstance(document, dict):
        raise RequestInvalid("The request body is not a JSON object")
    return document


def _refuse_repeated_keys(pairs: list[tuple[str, None]]) -> None:
    seen = set()
    for key, _ in pairs:
        if key in seen:
            raise RequestInvalid(f"The request body has the key {clip(key, 60)} more than once in one object")
        seen.add(key)
