"""Logins for Amazon's registries, in exchange for an access key or a role (``wave.md`` §2.4.7)."""

import asyncio
import hmac
from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from hashlib import sha256
from re import compile as compile_pattern
from time import monotonic, time
from typing import Protocol
from urllib.parse import urlencode

from yarl import URL

from wave_proxy.errors import Denied, RequestInvalid, UpstreamError
from wave_proxy.image.oci import read_json_object
from wave_proxy.upstream.credentials import Login
from wave_proxy.upstream.egress import Egress, Endpoint

_ECR = compile_pattern(r"[0-9]{12}\.dkr\.ecr(?:-fips)?\.([a-z0-9-]+)\.(amazonaws\.com(?:\.cn)?)")
_PUBLIC = "public.ecr.aws"
_REFUSED = "Unable to acquire AWS ECR authorization token"
_MAX_BYTES = 1 << 20

LASTS_S = 3 * 3600.0
_LASTS_AT_LEAST_S = 60.0
_EARLY_S = 300.0
_MAX_KNOWN = 1000

_Place = tuple[str, str]
"""A registry, and the key of the configured login."""


@dataclass(frozen=True, slots=True)
class AwsKeys:
    """An access key, its secret, and the session that they are of, if they are temporary."""

    access_key: str
    secret_key: str = field(repr=False)
    session_token: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class EcrLogin:
    """A login and for how many seconds it may be used."""

    login: Login
    lasts_s: float


@dataclass(frozen=True, slots=True)
class _Service:
    name: str
    region: str
    host: str
    target: str


def is_ecr(registry: str) -> bool:
    """Whether that host is one of Amazon's registries."""
    return registry == _PUBLIC or _ECR.fullmatch(registry) is not None


class Ecr:
    """Exchanges keys for logins.

    ``url`` stands for Amazon's own addresses, where they are to be reached in another way; ``own`` are this server's
    keys, with which it takes on the roles that users name.
    """

    def __init__(self, egress: Egress, *, url: str = "", own: AwsKeys | None = None) -> None:
        self._egress = egress
        self._url = url.rstrip("/")
        self._own = own

    async def login(self, registry: str, username: str, password: str, now: float) -> EcrLogin:
        """The login for an Amazon registry: of an access key and its secret, or a role's ARN and its external id.

        Raises Denied when Amazon refuses, RequestInvalid for a role where this server has no keys, UpstreamUnavailable.
        """
        service, lasts_s = _service(registry), LASTS_S
        keys = AwsKeys(username, password)
        if username.startswith("arn:"):
            keys, lasts_s = await self._assume(service.region, username, password, now)
        headers = {"Content-Type": "application/x-amz-json-1.1", "X-Amz-Target": service.target}
        content = await self._ask(f"https://{service.host}/", headers, b"{}", keys, service, now)
        return EcrLogin(_read_login(content), lasts_s)

    async def _assume(self, region: str, role: str, external_id: str, now: float) -> tuple[AwsKeys, float]:
        """Temporary keys of a role, and for how many seconds to use them."""
        if self._own is None:
            raise RequestInvalid(f"{role}: this server takes on no AWS roles: [aws] access_key is not set")
        form = {"Action": "AssumeRole", "Version": "2011-06-15", "RoleArn": role, "RoleSessionName": "wave-proxy"}
        body = urlencode(form | ({"ExternalId": external_id} if external_id else {})).encode()
        service = _Service("sts", region, f"sts.{region}.amazonaws.com", "")
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        content = await self._ask(f"https://{service.host}/", headers, body, self._own, service, now)
        text = content.decode(errors="replace")
        keys = AwsKeys(_element(text, "AccessKeyId"), _element(text, "SecretAccessKey"), _element(text, "SessionToken"))
        ends = datetime.fromisoformat(_element(text, "Expiration")).timestamp()
        return keys, min(LASTS_S, max(ends - now - _EARLY_S, _LASTS_AT_LEAST_S))

    async def _ask(
        self, url: str, headers: Mapping[str, str], body: bytes, keys: AwsKeys, service: _Service, now: float
    ) -> bytes:
        signed = signature(url, headers, body, keys, service.name, service.region, now)
        there = Endpoint("", self._url, allow_private=True) if self._url else None
        sent = {**headers, **signed, "Host": service.host}
        response = await self._egress.request("POST", self._url or url, headers=sent, endpoint=there, body=body)
        status = response.status
        if status in (400, 401, 403):
            response.release()
            raise Denied(f"{_REFUSED}: {service.host} refuses the access key {keys.access_key[:8]}… (HTTP {status})")
        if status != 200:
            raise await self._egress.failure(response, "an authorization token")
        return await self._egress.read(response, _MAX_BYTES, f"the answer of {service.host}")


class _Secret(Protocol):
    def get_secret_value(self) -> str: ...


class AwsTable(Protocol):
    """The ``[aws]`` table."""

    @property
    def access_key(self) -> str: ...
    @property
    def secret_key(self) -> _Secret: ...
    @property
    def url(self) -> str: ...


def read_ecr(egress: Egress, table: AwsTable, *, as_itself: bool = True) -> Ecr:
    """The exchange as it is configured; unless ``as_itself``, without this server's own keys."""
    own = AwsKeys(table.access_key, table.secret_key.get_secret_value())
    return Ecr(egress, url=table.url, own=own if own.access_key and as_itself else None)


class EcrLogins:
    """What configured logins for Amazon's registries are exchanged for, kept for as long as that may be used."""

    def __init__(self, ecr: Ecr) -> None:
        self._ecr = ecr
        self._known: dict[_Place, tuple[Login, float]] = {}  # until when, monotonic
        self._exchanges: dict[_Place, asyncio.Task[Login]] = {}

    async def exchanged(self, registry: str, login: Login | None) -> Login | None:
        """The login to use at a registry: another one at Amazon's, the same elsewhere. Raises as ``Ecr.login``."""
        if login is None or login.username == "AWS" or not is_ecr(registry):
            return login
        place = registry, login.key
        known, until = self._known.get(place, (login, 0.0))
        if monotonic() < until:
            return known
        exchange = self._exchanges.get(place)
        if exchange is None:
            exchange = self._exchanges[place] = asyncio.create_task(self._exchange(place, login))
            exchange.add_done_callback(lambda done: self._end(place, done))
        return await asyncio.shield(exchange)

    async def _exchange(self, place: _Place, login: Login) -> Login:
        found = await self._ecr.login(place[0], login.username, login.password, time())
        self._known[place] = replace(found.login, source=login.source), monotonic() + found.lasts_s
        if len(self._known) > _MAX_KNOWN:
            del self._known[next(iter(self._known))]
        return self._known[place][0]

    def _end(self, place: _Place, done: "asyncio.Task[Login]") -> None:
        del self._exchanges[place]
        if not done.cancelled():
            done.exception()  # nobody may be left to take it

    async def close(self) -> None:
        """End the exchanges that still run."""
        exchanges = list(self._exchanges.values())
        for exchange in exchanges:
            exchange.cancel()
        await asyncio.gather(*exchanges, return_exceptions=True)


def _service(registry: str) -> _Service:
    if registry == _PUBLIC:
        target = "SpencerFrontendService.GetAuthorizationToken"
        return _Service("ecr-public", "us-east-1", "api.ecr-public.us-east-1.amazonaws.com", target)
    match = _ECR.fullmatch(registry)
    if match is None:
        raise RequestInvalid(f"{registry} is no registry of Amazon's")
    target = "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken"
    return _Service("ecr", match[1], f"api.ecr.{match[1]}.{match[2]}", target)


def _read_login(content: bytes) -> Login:
    match read_json_object(content, "AWS ECR authorization token"):
        case {"authorizationData": {"authorizationToken": str(text)}} | {
            "authorizationData": [{"authorizationToken": str(text)}, *_]
        }:
            user, colon, password = b64decode(text).decode(errors="replace").partition(":")
            if colon:
                return Login(user, password)
    raise UpstreamError(_REFUSED)


def _element(text: str, name: str) -> str:
    """The text of the first element with that name."""
    _, opening, rest = text.partition(f"<{name}>")
    value, closing, _ = rest.partition(f"</{name}>")
    if not opening or not closing:
        raise UpstreamError(f"{_REFUSED}: the answer for the role has no {name}")
    return value.strip()


def signature(
    url: str, headers: Mapping[str, str], body: bytes, keys: AwsKeys, service: str, region: str, now: float
) -> dict[str, str]:
    """The headers that sign a POST to ``url``, which has no query.

    Source: AWS, "Signature Version 4 signing process".
    """
    stamp = datetime.fromtimestamp(now, UTC).strftime("%Y%m%dT%H%M%SZ")
    added = {"X-Amz-Date": stamp} | ({"X-Amz-Security-Token": keys.session_token} if keys.session_token else {})
    target = URL(url)
    signed = {name.lower(): value.strip() for name, value in {**headers, **added, "Host": target.raw_authority}.items()}
    names = ";".join(sorted(signed))
    lines = "".join(f"{name}:{signed[name]}\n" for name in sorted(signed))
    request = f"POST\n{target.raw_path}\n\n{lines}\n{names}\n{sha256(body).hexdigest()}"
    scope = f"{stamp[:8]}/{region}/{service}/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{sha256(request.encode()).hexdigest()}"
    key = f"AWS4{keys.secret_key}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    proof = hmac.digest(key, text.encode(), "sha256").hex()
    credential = f"AWS4-HMAC-SHA256 Credential={keys.access_key}/{scope}, SignedHeaders={names}, Signature={proof}"
    return {**added, "Authorization": credential}
