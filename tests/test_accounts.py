"""Accounts: hashes of both kinds, logins that are remembered, and a limit on guessing."""

import asyncio
import hashlib
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from wave_proxy.errors import TooManyRequests, Unauthorized
from wave_proxy.state.accounts import BUILDER, Accounts, hash_password, parse_basic, parse_hash

QUICK = f"sha256:{hashlib.sha256(b'hunter2').hexdigest()}"
SLOW = f"scrypt:1024:8:1:{b'salt-of-tests'.hex()}:" + (
    hashlib.scrypt(b"correct horse", salt=b"salt-of-tests", n=1024, r=8, p=1, dklen=32).hex()
)
HERE = "192.0.2.1"


def basic(user: str, password: str) -> str:
    return f"Basic {b64encode(f'{user}:{password}'.encode()).decode()}"


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts the computations of scrypt."""
    calls: list[int] = []
    compute = hashlib.scrypt

    def count(*arguments: object, **named: object) -> bytes:
        calls.append(1)
        return compute(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(hashlib, "scrypt", count)
    yield calls


@pytest.mark.parametrize(
    ("text", "password"),
    [pytest.param(QUICK, "hunter2", id="sha256"), pytest.param(SLOW, "correct horse", id="scrypt")],
)
def test_a_hash_matches_its_password_alone(text: str, password: str) -> None:
    known = parse_hash(text)
    assert known.matches(password)
    assert not known.matches(f"{password}x")
    assert not known.matches("")
    assert known.digest.hex() not in repr(known)


def test_a_hash_that_was_printed_can_be_read() -> None:
    one, other = hash_password("hällo"), hash_password("hällo")
    assert one != other
    assert one.startswith("scrypt:16384:8:5:")
    assert parse_hash(one).matches("hällo")
    assert not parse_hash(one).matches("hallo")


@pytest.mark.parametrize(
    "text",
    [
        "hunter2",
        "",
        "sha256:abc",
        QUICK.upper(),
        "scrypt:1024:8:1:00:00",
        SLOW.replace("1024", "1000"),
        SLOW.replace(":1024:8", ":1024:0"),
        SLOW.replace(":8:1:", ":8:0:"),
        SLOW.replace("1024", "16777216"),
        f"{SLOW}00",
        f" {SLOW}",
    ],
)
def test_what_is_no_hash(text: str) -> None:
    with pytest.raises(ValueError, match=r"^accounts\.admin: (expected|scrypt:<N>)") as refused:
        Accounts({"admin": text})
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (basic("ada", "a:b"), ("ada", "a:b")),
        (basic("ada", "x").replace("Basic", "bASIC"), ("ada", "x")),
        ("Basic !!!", ("", "")),
        ("Bearer YTpi", ("", "")),
        ("", ("", "")),
    ],
)
def test_reading_a_header(header: str, expected: tuple[str, str]) -> None:
    assert parse_basic(header) == expected


async def test_who_is_right_and_who_is_not() -> None:
    accounts = Accounts({"ada": SLOW, "bob": QUICK}, builder_secret="s3cret")
    assert await accounts.check(basic("ada", "correct horse"), HERE) == "ada"
    assert await accounts.check(basic("bob", "hunter2"), HERE) == "bob"
    assert await accounts.check(basic(BUILDER, "s3cret"), HERE) == BUILDER
    for user, password in (("ada", "hunter2"), ("bob", "correct horse"), ("eve", "x"), (BUILDER, "x"), ("", "x")):
        with pytest.raises(Unauthorized):
            await accounts.check(basic(user, password), HERE)
    with pytest.raises(Unauthorized):
        await accounts.check("", HERE)
    with pytest.raises(Unauthorized):
        await Accounts({}).check(basic("ada", ""), HERE)


async def test_who_was_right_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    accounts = Accounts({"ada": SLOW})
    with counted(monkeypatch) as calls:
        await asyncio.gather(*(accounts.check(basic("ada", "correct horse"), HERE) for _ in range(20)))
        assert len(calls) <= 2  # as many as are computed at once
        for _ in range(20):
            await accounts.check(basic("ada", "correct horse"), HERE)
        assert len(calls) <= 2
        with pytest.raises(Unauthorized):
            await accounts.check(basic("ada", "wrong"), HERE)
        assert len(calls) <= 3


@pytest.mark.parametrize("user", ["ada", "bob", "nobody"])
async def test_a_wrong_login_takes_as_long_whoever_it_is_for(monkeypatch: pytest.MonkeyPatch, user: str) -> None:
    accounts = Accounts({"ada": SLOW, "bob": QUICK})
    with counted(monkeypatch) as calls:
        with pytest.raises(Unauthorized):
            await accounts.check(basic(user, "wrong"), HERE)
        assert len(calls) == 1


async def test_builders_never_wait_for_a_slow_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    accounts = Accounts({"ada": SLOW}, builder_secret="s3cret")
    with counted(monkeypatch) as calls:
        for _ in range(30):
            with pytest.raises(Unauthorized):
                await accounts.check(basic(BUILDER, "wrong"), HERE)
        await accounts.check(basic(BUILDER, "s3cret"), HERE)
        assert calls == []


@pytest.mark.parametrize("text", [QUICK, SLOW])
async def test_guesses_of_one_address_are_limited_also_at_once(text: str) -> None:
    accounts = Accounts({"ada": text})
    guesses = [accounts.check(basic("ada", f"wrong {number}"), HERE) for number in range(60)]
    answers = [type(answer) for answer in await asyncio.gather(*guesses, return_exceptions=True)]
    assert answers.count(Unauthorized) in (20, 21)  # two are computed at once
    assert answers.count(TooManyRequests) == 60 - answers.count(Unauthorized)
    with pytest.raises(TooManyRequests) as refused:
        await accounts.check(basic("ada", "correct horse"), HERE)
    assert refused.value.retry_after_s in range(1, 61)
    with pytest.raises(Unauthorized):
        await accounts.check(basic("ada", "wrong"), "192.0.2.2")
