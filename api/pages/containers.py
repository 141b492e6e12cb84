"""The page of a container request."""

from datetime import UTC, datetime, timedelta, timezone
from re import compile as compile_pattern
from time import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from api.answers import described
from api.endpoints import HTML, Answer, endpoint, routes_of
from api.pages.audience import varying, wants_page
from api.pages.jobs import commands_for, inspect_path, path_of, scan_facts
from api.pages.render import Fact, fact, given, message, page
from api.replies import json_reply
from api.shapes import Message
from wave_proxy.image.build import BuildRecord, Kind
from wave_proxy.image.request import Identity
from wave_proxy.state.builds import BuildStore
from wave_proxy.state.tokens import TokenRecord, TokenStore

_TOKEN = compile_pattern(r"[0-9a-f]{32}")


class ContainerPages:
    """The pages of container requests; ``authority`` is what image names begin with."""

    def __init__(self, tokens: TokenStore, builds: BuildStore, authority: str) -> None:
        self._tokens = tokens
        self._builds = builds
        self._authority = authority
        self.routes = routes_of(self)

    @endpoint(
        "GET",
        "/view/containers/{token}",
        "Pages",
        {
            200: Answer("The request.", media_types=(HTML,)),
            404: Answer("The token is unknown, or its record is not kept any more.", Message, (HTML,)),
        },
    )
    async def show(self, request: Request) -> Response:
        """A container request: what was asked for, and which image came of it."""
        token: str = request.path_params["token"]
        record = await self._tokens.find_shown(token) if _TOKEN.fullmatch(token) else None
        if record is None:
            return varying(_unknown(f"Unknown container token: {token[:64]}", request))
        build = await self._builds.find(record.request.build_id) if record.request.build_id else None
        told = described(record, build, self._authority)
        config = told.get("containerConfig", {})
        return page(
            "container.html",
            f"Container {token}",
            _facts(record, told),
            changes=_changes(config),
            layers=config.get("layers", []),
            commands=commands_for(told["waveImage"]) if _can_be_pulled(record, build) else (),
            files=[("Container file", told.get("containerFile")), ("Conda file", told.get("condaFile"))],
        )


def _unknown(text: str, request: Request) -> Response:
    if not wants_page(request):
        return json_reply({"message": text}, 404)
    hint = (
        "The token may be mistyped: it is the 32 letters and digits behind `/wt/` in the name of an image. Or it is "
        "too old: requests are kept for a while after their tokens have ended, which the operator sets with "
        "`[tokens] retention`."
    )
    return message("Unknown container", text, 404, hint=hint)


def _facts(record: TokenRecord, told: dict[str, Any]) -> list[Fact]:
    has_own_name = not (told.get("freeze") or told["mirror"])
    job_id: str = told.get("buildId", "")
    kind: Kind = "mirror" if told["mirror"] else "build"
    source = told["sourceImage"] if has_own_name else _source_of(told)
    expires = datetime.fromisoformat(told["expiration"])
    return [
        fact("Image to pull", told["waveImage"]),
        *given(fact("Digest as pulled", told.get("waveDigest") if has_own_name else None)),
        *(_lifetime(record, expires) if has_own_name else ()),
        *given(
            fact("Made from", source, inspect_path(source)),
            fact("Digest there", told.get("sourceDigest")),
        ),
        fact("Asked for at", _in_zone(told["timestamp"], told["zoneId"])),
        *given(
            fact("Platform", told.get("platform")),
            fact(kind.title(), job_id, path_of(kind, job_id)),
            fact("Begun for this request", told.get("buildNew")),
            fact("Frozen", told.get("freeze")),
        ),
        *scan_facts(told),
        *given(
            fact("Build repository", told.get("buildRepository")),
            fact("Cache repository", told.get("cacheRepository")),
            fact("Fusion", told.get("fusionVersion")),
            fact("Fingerprint", told.get("fingerprint")),
            fact("User id", told.get("user", {}).get("id")),
            fact("Workspace", told.get("workspaceId")),
            # Clients name one with every request, also for nobody and for users of ours.
            fact("Seqera Platform", told.get("towerEndpoint") if _is_of_platform(record.request.identity) else None),
        ),
    ]


def _is_of_platform(identity: Identity) -> bool:
    """Whether a Platform knows that user; the token that shows it is not kept once the container's has ended."""
    return identity.user_id is not None and not identity.local_email


def _source_of(told: dict[str, Any]) -> str:
    """Of an image that is pulled by its own name: what a mirror is a copy of, and nothing of a frozen one."""
    source: str = told["containerImage"]
    return source if source != told["waveImage"] else ""


def _can_be_pulled(record: TokenRecord, build: BuildRecord | None) -> bool:
    """Whether it is there, or will be: pulls by token wait for an image that is still being built."""
    if record.request.is_durable:
        return build is None or build.succeeded is True
    return record.is_valid(time()) and (build is None or build.succeeded is not False)


def _lifetime(record: TokenRecord, expires: datetime) -> list[Fact]:
    if record.deleted:
        return [fact("Token", "was ended by an operator")]
    return [fact("Token works until" if record.is_valid(time()) else "Token has ended at", expires)]


def _changes(config: dict[str, Any]) -> list[Fact]:
    return given(
        fact("Entrypoint", config.get("entrypoint")),
        fact("Command", config.get("cmd")),
        fact("Environment", config.get("env")),
        fact("Working directory", config.get("workingDir")),
    )


def _in_zone(timestamp: str, zone: str) -> datetime:
    """A time as the API tells it, on the clock of who asked; ``zone`` is ``Z`` or ``+hh:mm``."""
    moment = datetime.fromisoformat(timestamp)
    if zone == "Z":
        return moment.astimezone(UTC)
    sign, hours, minutes = (-1 if zone[0] == "-" else 1), int(zone[1:3]), int(zone[4:6])
    return moment.astimezone(timezone(sign * timedelta(hours=hours, minutes=minutes)))
