"""How much the service is used, for those with an account: builds, pulls, mirrors and scans (``wave.md`` §8)."""

from dataclasses import dataclass
from re import ASCII
from re import compile as compile_pattern
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from api import shapes
from api.callers import client_address
from api.endpoints import INVALID, LOGIN, Answer, Parameter, endpoint, route_of
from api.replies import json_reply
from wave_proxy.errors import RequestInvalid
from wave_proxy.image.oci import ARCHITECTURES
from wave_proxy.state.accounts import Accounts
from wave_proxy.state.usage import Counts, Kind, Usage

_VERSIONS = ("v1alpha2", "v1alpha3")
_SERIES: dict[str, tuple[Kind, str]] = {
    "builds": ("builds", "builds were begun"),
    "pulls": ("pulls", "images were pulled"),
    "fusion/pulls": ("fusion", "images with Fusion were pulled"),
    "mirrors": ("mirrors", "mirrors were begun"),
    "scans": ("scans", "security scans were begun"),
}
_DAY = compile_pattern(r"\d{4}-\d{2}-\d{2}", ASCII)

_DATE = Parameter(
    "date",
    "Those of one day: `2026-01-31`. A day that no calendar has counts none.",
    {"type": "string", "pattern": f"^{_DAY.pattern}$"},
)
_ORGANISATION = Parameter("org", "Those of one organisation: the domain of its users' e-mail addresses.")
_ARCHITECTURE = Parameter("arch", "Those for one architecture.", {"type": "string", "enum": list(ARCHITECTURES)})


@dataclass(frozen=True, slots=True)
class _Question:
    """What of a series is asked for; None means all."""

    date: str | None
    organisation: str | None
    architecture: str | None


class UsageMetrics:
    """The endpoints of usage metrics: ``/v1alpha3`` knows architectures, ``/v1alpha2`` is the older form."""

    def __init__(self, usage: Usage, accounts: Accounts) -> None:
        self._usage = usage
        self._accounts = accounts
        self.routes = [
            self._route(version, path, kind, words) for version in _VERSIONS for path, (kind, words) in _SERIES.items()
        ]

    def _route(self, version: str, path: str, kind: Kind, words: str) -> Route:
        answer, shape, parameters = (
            (self._answer, shapes.UsageByArchitecture, (_DATE, _ORGANISATION, _ARCHITECTURE))
            if version == "v1alpha3"
            else (self._answer_older, shapes.Usage, (_DATE, _ORGANISATION))
        )

        async def show(request: Request) -> Response:
            await self._accounts.check(request.headers.get("authorization", ""), client_address(request))
            return json_reply(await answer(kind, _question(request)))

        show.__doc__ = f"How many {words}.\n\nDays are those of UTC. Counts are half a second old at most."
        show.__qualname__ = f"{type(self).__name__}.{kind}_{version}"
        answers = {200: Answer("The counts.", shape), 400: INVALID, **LOGIN}
        declare = endpoint(
            "GET", f"/{version}/metrics/{path}", "Usage", answers, parameters=parameters, login="account"
        )
        return route_of(declare(show))

    async def _answer(self, kind: Kind, asked: _Question) -> dict[str, Any]:
        counts = await self._usage.read(kind, asked.date, asked.organisation, asked.architecture)
        return _described(kind, counts) | ({"arch": asked.architecture} if asked.architecture else {})

    async def _answer_older(self, kind: Kind, asked: _Question) -> dict[str, Any]:
        counts = await self._usage.read(kind, asked.date, asked.organisation)
        # As the API page has it; all other answers are the same in both versions.
        return {"count": counts.count} if asked.date and asked.organisation else _described(kind, counts)


def _described(kind: Kind, counts: Counts) -> dict[str, Any]:
    answer: dict[str, Any] = {"metric": kind, "count": counts.count}
    return answer | ({"orgs": counts.organisations} if counts.organisations else {})


def _question(request: Request) -> _Question:
    """Raises RequestInvalid in the words of ``wave.md`` §8.5, also for an architecture that is then not looked at."""
    asked = request.query_params
    date, architecture = asked.get("date") or None, asked.get("arch") or None
    if date and not _DAY.fullmatch(date):
        raise RequestInvalid("date format should be yyyy-MM-dd")
    if architecture and architecture not in ARCHITECTURES:
        raise RequestInvalid(f"arch should be one of [{', '.join(ARCHITECTURES)}]")
    return _Question(date, asked.get("org") or None, ARCHITECTURES[architecture] if architecture else None)
