"""Logins of Platform users, as a worker gets them from the api over its Unix socket."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.outgoing import answer, scripted
from tests.patience import PATIENCE_S
from wave_proxy.errors import Denied, UpstreamUnavailable
from wave_proxy.image.request import Identity
from wave_proxy.serve import platform_logins
from wave_proxy.serve.access import Access
from wave_proxy.serve.platform_logins import PlatformLogins
from wave_proxy.upstream.credentials import Credentials, Login
from wave_proxy.upstream.egress import unix_session

CARL = Identity(7, "carl@acme.org", 12, access_token="secret-of-carl", endpoint="https://platform.example")
DORA = Identity(8, "dora@acme.org", 12, access_token="secret-of-dora", endpoint="https://platform.example")
LOGIN = Login("robot", "pass")
FOUND = answer(body=json.dumps({"username": "robot", "password": "pass"}).encode())
NONE = answer("204 No Content")
TOKEN = "a" * 32


def refusal(status: str) -> bytes:
    return answer(status, json.dumps({"message": "said by the api"}).encode())


class Api:
    """The api's side: what it answers, and what it was asked."""

    def __init__(self) -> None:
        self.says = FOUND
        self.asked: list[dict[str, list[str]]] = []
        self.held: asyncio.Event | None = None

    async def reply(self, head: str) -> bytes:
        target = urlsplit(head.split()[1])
        assert target.path == "/internal/login"
        self.asked.append(parse_qs(target.query))
        if self.held is not None:
            await self.held.wait()
        return self.says


@asynccontextmanager
async def logins(tmp_path: Path, api: Api) -> AsyncIterator[PlatformLogins]:
    path = str(tmp_path / "api.sock")
    async with scripted(api.reply, path=path):
        found = PlatformLogins(unix_session(path))
        try:
            yield found
        finally:
            await found.close()


async def find(found: PlatformLogins, identity: Identity = CARL, repository: str = "acme/x") -> Login | None:
    return await found.find(identity, TOKEN, "quay.io", repository)


def forget_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform_logins, "_REMEMBERED_S", 0.0)
    monkeypatch.setattr(platform_logins, "_AGAIN_S", 0.0)
    monkeypatch.setattr(platform_logins, "_PATIENCE_S", PATIENCE_S)


async def test_it_is_asked_once_and_remembered(tmp_path: Path) -> None:
    api = Api()
    async with logins(tmp_path, api) as found:
        assert set(await asyncio.gather(*(find(found) for _ in range(20)))) == {LOGIN}
        assert await find(found) == LOGIN
        assert api.asked == [{"token": [TOKEN], "registry": ["quay.io"], "repository": ["acme/x"]}]
        await find(found, DORA)
        await find(found, repository="acme/y")
        assert len(api.asked) == 3  # nobody gets what was found for another user or place


async def test_no_login_is_an_answer_as_well(tmp_path: Path) -> None:
    api = Api()
    api.says = NONE
    async with logins(tmp_path, api) as found:
        assert [await find(found), await find(found)] == [None, None]
        assert len(api.asked) == 1


@pytest.mark.parametrize("status", ["500 Oops", "502 Bad Gateway", "503 Unavailable", "504 Timeout", "429 Too Many"])
async def test_what_is_known_goes_on_when_nobody_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    forget_soon(monkeypatch)
    api = Api()
    async with logins(tmp_path, api) as found:
        assert await find(found) == LOGIN
        api.says = refusal(status)
        assert await find(found) == LOGIN
        assert len(api.asked) == 2
        with pytest.raises(UpstreamUnavailable, match=r"quay.io can't be had.*said by the api"):
            await find(found, DORA)


async def test_an_api_that_is_away_or_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_soon(monkeypatch)
    monkeypatch.setattr(platform_logins, "_PATIENCE_S", 0.05)
    api = Api()
    async with logins(tmp_path, api) as found:
        assert await find(found) == LOGIN
        api.held = asyncio.Event()
        assert await find(found) == LOGIN
        api.held.set()
    away = PlatformLogins(unix_session(str(tmp_path / "no.sock")))
    with pytest.raises(UpstreamUnavailable, match="the API is restarting"):
        await find(away)
    await away.close()


@pytest.mark.parametrize("status", ["400 Bad Request", "401 Unauthorized", "403 Forbidden"])
async def test_a_refusal_ends_what_was_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str) -> None:
    forget_soon(monkeypatch)
    api = Api()
    async with logins(tmp_path, api) as found:
        assert await find(found) == LOGIN
        api.says = refusal(status)
        with pytest.raises(Denied, match="said by the api"):
            await find(found)
        api.says = refusal("503 Unavailable")
        with pytest.raises(UpstreamUnavailable):
            await find(found)


# --- who gets which login --------------------------------------------------------------------------------------------

CONFIGURED = Credentials(
    {"quay.io": Login("all", "1"), "quay.io/acme": Login("acme", "2")}, {"quay.io/acme": ["*@acme.org"]}
)


@pytest.mark.parametrize(
    ("identity", "says", "user"),
    [
        (Identity(), FOUND, "all"),
        (Identity(1, "alice@acme.org"), FOUND, "acme"),
        (Identity(1, "alice@else.org"), FOUND, "all"),
        (CARL, FOUND, "robot"),
        (CARL, NONE, "all"),  # what a Platform says of addresses opens nothing here: anybody may run one
        (CARL, refusal("404 Not Found"), "all"),  # an api without Platforms
    ],
)
async def test_whose_login(tmp_path: Path, identity: Identity, says: bytes, user: str) -> None:
    api = Api()
    api.says = says
    async with logins(tmp_path, api) as found:
        login = await Access(CONFIGURED, found).find_login("quay.io", "acme/x", identity, TOKEN)
        assert login is not None
        assert login.username == user
        assert len(api.asked) == (identity is CARL)


def test_keys_of_users() -> None:
    local = Identity(1, "carl@acme.org")
    keys = [
        Identity().key,
        local.key,
        CARL.key,
        DORA.key,
        Identity(7, "carl@acme.org", access_token="x", endpoint="https://other.example").key,
    ]
    assert keys[0] == ""
    assert len(set(keys)) == len(keys)
    assert local.key == Identity(None, "CARL@acme.org", 5).key
    assert CARL.key == Identity(7, "carl@acme.org", 3, "renewed", endpoint=CARL.endpoint, workflow_id="w").key
