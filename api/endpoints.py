"""Endpoints: each says, beside the code that answers it, what it takes and every answer that it has.

Routes are made from that, and so is the OpenAPI document (``api.openapi``).
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from inspect import getdoc
from typing import Any, Literal, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from api.shapes import Message

Handler = Callable[[Request], Awaitable[Response]]
Login = Literal["", "account", "token"]
Schema = Mapping[str, Any]
_Handler = TypeVar("_Handler", bound=Callable[..., Awaitable[Response]])

STRING: Schema = {"type": "string"}


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the path or the query, or a header."""

    name: str
    text: str
    schema: Schema = field(default_factory=lambda: STRING)
    place: Literal["path", "query", "header"] = "query"


@dataclass(frozen=True, slots=True)
class Answer:
    """What one status means.

    ``shape`` is the type of its JSON (``api.shapes``); a body that is no JSON is of one of the ``media_types``, and
    with neither of them there is none. ``may_be_empty``: some answers of this status have no body. ``headers`` maps the
    names of headers that come with it to their meanings.
    """

    text: str
    shape: Any = None
    media_types: tuple[str, ...] = ()
    may_be_empty: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One method of one path, under the heading ``group``.

    ``body`` is the JSON that it takes, ``example`` such a document. ``login``: ``account`` is one of ``[accounts]`` by
    Basic authentication, which it refuses to do without; ``token`` is an access token, which may also stand in the
    body, or nowhere.
    """

    method: str
    path: str
    group: str
    answers: Mapping[int, Answer]
    parameters: tuple[Parameter, ...] = ()
    body: type[BaseModel] | None = None
    example: Mapping[str, Any] | None = None
    login: Login = ""
    deprecated: bool = False


@dataclass(frozen=True, slots=True)
class Described:
    """An endpoint and what people are told of it: ``summary`` and ``text`` are its handler's docstring."""

    endpoint: Endpoint
    name: str
    summary: str
    text: str


TEXT = "text/plain"  # Starlette adds the charset
HTML = "text/html"

INVALID = Answer("The request breaks a rule: the message names the member, its value and the rule.", Message)
UNKNOWN = Answer("There is no such thing, or none any more.")
NOT_HERE = Answer("What is asked for is switched off, or not supported.", Message)

_CHALLENGE = {"WWW-Authenticate": "What login is wanted, and why the one that came is refused."}
_LATER = {
    "Retry-After": "After how many seconds it is worth to ask again.",
    "RateLimit-Limit": "Of our own quotas: how many there are in a period.",
    "RateLimit-Remaining": "Of our own quotas: how many are left.",
    "RateLimit-Reset": "Of our own quotas: after how many seconds there is one more.",
}

# What a login of `[accounts]` may come to.
LOGIN: Mapping[int, Answer] = {
    401: Answer("The login is missing or wrong.", headers=_CHALLENGE),
    429: Answer("There were too many wrong logins from this address.", Message, headers=_LATER),
}

# What a body may come to that says who asks, and that names images of other registries.
ASKING_UPSTREAM: Mapping[int, Answer] = {
    400: INVALID,
    401: Answer("The access token is not valid.", headers=_CHALLENGE),
    403: Answer(
        "A Platform refuses this user (its other errors are handed on as well), or the form is one of another site.",
        Message,
    ),
    404: Answer("A Platform does not know what is asked of it.", Message),
    408: Answer("A Platform does not answer in time.", Message),
    412: Answer("A Platform gives no new token for one that has expired.", Message),
    413: Answer("The body is larger than `[http] max_body_bytes`.", Message),
    429: Answer("A limit is reached, ours or that of an upstream registry.", Message, headers=_LATER),
    502: Answer("An upstream registry's answer can't be used.", Message),
    504: Answer("An upstream registry does not answer in time.", Message),
}


def endpoint(
    method: str, path: str, group: str, answers: Mapping[int, Answer], **more: Any
) -> Callable[[_Handler], _Handler]:
    """Declares what the decorated handler is; the arguments are those of Endpoint, the docstring is for people."""
    declared = Endpoint(method, path, group, answers, **more)

    def declare(handler: _Handler) -> _Handler:
        vars(handler)["endpoint"] = declared
        return handler

    return declare


def routes_of(owner: object) -> list[Route]:
    """The routes of all handlers that the class of ``owner`` declares, in the order in which they stand there."""
    return [route_of(getattr(owner, name)) for name, member in vars(type(owner)).items() if declared(member)]


def route_of(handler: Handler) -> Route:
    """The route of a declared handler. Raises TypeError for one that is not declared."""
    found = declared(handler)
    if found is None:
        raise TypeError(f"{handler!r} is not declared as an endpoint")
    return Route(found.path, handler, methods=[found.method])


def declared(handler: object) -> Endpoint | None:
    """What a handler was declared as; None for one that was not."""
    found = getattr(handler, "endpoint", None)
    return found if isinstance(found, Endpoint) else None


def describe(handler: Any) -> Described:
    """A declared handler for people. Raises TypeError for one that is not declared, or has no docstring."""
    found, doc = declared(handler), getdoc(handler)
    if found is None or not doc:
        raise TypeError(f"{handler!r} is not declared as an endpoint, or says nothing of itself")
    summary, _, text = doc.partition("\n")
    owner, _, name = handler.__qualname__.rpartition(".")
    return Described(found, f"{owner.lower()}_{name}".strip("_"), summary.rstrip("."), text.strip())
