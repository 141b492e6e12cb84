"""Access tokens that an operator issues: what they prove, when they end, and what is kept of them."""

import re
from collections.abc import AsyncIterator, Callable
from time import time

import pytest

from tests.patience import PATIENCE_S, eventually
from wave_proxy.errors import AccessTokenRefused, RequestInvalid
from wave_proxy.state.identities import AccessTokens, is_ours
from wave_proxy.state.redis import Redis, connect

DAY_S = 86400.0


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    client = connect(redis_url)
    yield client
    await client.aclose()


async def test_a_token_proves_its_user(redis: Redis) -> None:
    text, issued = await AccessTokens(redis).create(" Ada@Example.org ", note="laptop")
    assert re.fullmatch(rf"wpt-{issued.id}-[a-z2-7]{{32}}", text)
    assert is_ours(text)
    found = await AccessTokens(redis).check(text)
    assert (found.id, found.email, found.note) == (issued.id, "ada@example.org", "laptop")
    assert (found.expires, found.state(time())) == (0.0, "valid")


async def test_a_user_has_one_number(redis: Redis) -> None:
    tokens = AccessTokens(redis)
    ids = [(await tokens.create(email))[1].user_id for email in ("ada@example.org", "ADA@example.org", "bob@site.io")]
    assert ids[0] == ids[1] != ids[2]
    assert 0 < ids[0] < 1 << 48


async def test_the_secret_is_kept_nowhere(redis: Redis) -> None:
    text, issued = await AccessTokens(redis).create("ada@example.org")
    await AccessTokens(redis).check(text)
    secret = text.rpartition("-")[2]
    kept = str([await redis.hgetall(key) for key in await redis.keys("*")])
    assert issued.id in kept
    assert secret not in kept
    assert secret not in repr(issued)
    assert issued.digest not in repr(issued)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda text: text[:-1], id="cut short"),
        pytest.param(lambda text: f"{text[:-1]}{'a' if text[-1] != 'a' else 'b'}", id="another secret"),
        pytest.param(lambda text: f"{text[:4]}aaaaaaaa{text[12:]}", id="another id"),
        pytest.param(lambda text: text.upper(), id="upper case"),
        pytest.param(lambda text: f"{text}\n", id="more behind it"),
        pytest.param(lambda _: "wpt-", id="the beginning alone"),
    ],
)
async def test_a_wrong_token_is_refused(redis: Redis, spoil: Callable[[str], str]) -> None:
    tokens = AccessTokens(redis)
    text, _ = await tokens.create("ada@example.org")
    with pytest.raises(AccessTokenRefused, match="does not exist"):
        await tokens.check(spoil(text))
    assert [token.last_used for token in await tokens.read_all()] == [0.0]


async def test_an_expired_token_is_refused(redis: Redis) -> None:
    tokens = AccessTokens(redis)
    text, issued = await tokens.create("ada@example.org", expires=time() + 0.5)
    await eventually(lambda: issued.state(time()) != "valid")
    with pytest.raises(AccessTokenRefused, match=r"is expired since 20\d\d-"):
        await tokens.check(text)


async def test_a_revoked_token_is_refused_by_every_process_at_once(redis: Redis) -> None:
    here, there = AccessTokens(redis), AccessTokens(redis)
    text, issued = await here.create("ada@example.org")
    other, _ = await here.create("ada@example.org")
    await there.check(text)
    await here.revoke([issued])
    with pytest.raises(AccessTokenRefused, match=r"is revoked since 20\d\d-"):
        await there.check(text)
    first = {token.id: token.revoked for token in await here.read_all()}
    await here.revoke([issued])
    assert {token.id: token.revoked for token in await there.read_all()} == first  # the first time counts
    await there.check(other)


async def test_whoever_has_not_the_secret_does_not_learn_how_a_token_is(redis: Redis) -> None:
    tokens = AccessTokens(redis)
    text, issued = await tokens.create("ada@example.org")
    await tokens.revoke([issued])
    with pytest.raises(AccessTokenRefused, match="does not exist"):
        await tokens.check(f"{text[:-1]}{'a' if text[-1] != 'a' else 'b'}")


async def test_a_use_is_written_down_once_a_minute(redis: Redis) -> None:
    tokens = AccessTokens(redis)
    text, issued = await tokens.create("ada@example.org")
    await tokens.check(text)
    (listed,) = await tokens.read_all()
    assert abs(listed.last_used - time()) < PATIENCE_S
    await redis.hset("wave:{identity}:used", issued.id, "1")
    await tokens.check(text)
    assert [token.last_used for token in await tokens.read_all()] == [1.0]


async def test_tokens_are_listed_by_user_and_age(redis: Redis) -> None:
    tokens = AccessTokens(redis)
    for email, note in (("bob@b.org", "1"), ("ada@a.org", "2"), ("bob@b.org", "3")):
        await tokens.create(email, note=note)
    assert [token.note for token in await tokens.read_all()] == ["2", "1", "3"]


async def test_tokens_that_ended_long_ago_are_forgotten(redis: Redis) -> None:
    tokens = AccessTokens(redis)
    text, old = await tokens.create("ada@example.org")
    _, recent = await tokens.create("ada@example.org")
    await tokens.revoke([old, recent])
    await redis.hset("wave:{identity}:revoked", old.id, str(time() - 91 * DAY_S))
    _, new = await tokens.create("bob@example.org")
    assert {token.id for token in await tokens.read_all()} == {recent.id, new.id}
    assert await redis.hlen("wave:{identity}:revoked") == 1
    with pytest.raises(AccessTokenRefused, match="does not exist"):
        await tokens.check(text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param({"email": "ada"}, "user: 'ada' is no e-mail address", id="no e-mail address"),
        pytest.param({"email": "a b@site"}, "user: ", id="with a blank"),
        pytest.param({"email": "a\x1b@site"}, "user: ", id="with a control character"),
        pytest.param({"email": f"{'a' * 250}@b.org"}, "user: ", id="too long"),
        pytest.param({"email": "a@b", "note": "x\ny"}, "note: expected one line", id="a note of two lines"),
        pytest.param({"email": "a@b", "note": "x" * 201}, "note: ", id="a long note"),
        pytest.param({"email": "a@b", "expires": 1.0}, "expires: 1970-01-01T00:00:01Z is over", id="over"),
    ],
)
async def test_what_makes_no_token(redis: Redis, arguments: dict[str, object], words: str) -> None:
    with pytest.raises(RequestInvalid, match=re.escape(words)):
        await AccessTokens(redis).create(**arguments)  # type: ignore[arg-type]
    assert await redis.keys("*") == []
